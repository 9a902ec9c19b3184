"""Which tokens to compute again: those that changed, their neighbors, and a few more to fill a bucket.

A token counts as changed if its model input moved, measured against the mean size of all tokens,

    score_j = ||x_j - x~_j|| / mean_i ||x~_i||  >  tau,      x~ what the slot was computed from.

Attention carries the change beyond those tokens, most of it to their neighbors, so the set grows by `ring` tokens in
each direction (within a frame). A free-running count would give every pass its own shapes; compiled graphs and tuned
kernels want few, so the count is rounded up to a share of 1/8, 1/4, 1/2 or 3/4, and the places that this leaves go to
the tokens nearest to the active ones. Above 70 % a partial pass is not worth its error, and everything is computed.

Positions are integer triples (frame, row, column), so that a crop, several reference images or a video need no special
case. SIGE (Li et al. 2022, arXiv 2211.02048) finds and dilates changed regions in this manner for convolutions.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BUCKETS = (0.125, 0.25, 0.5, 0.75)
NEAREST = 3  # tokens around the active ones among which `nearness` tells near from far
FULL_ABOVE = 0.7  # share of active tokens beyond which all are computed


def change_scores(
    tokens: Float[Tensor, "b n c"], before: Float[Tensor, "b n c"], eps: float = 1e-12
) -> Float[Tensor, " n"]:
    """Relative change of each token, the largest over the batch (its members share one set of active tokens)."""
    moved = (tokens - before).float().norm(dim=-1)
    size = before.float().norm(dim=-1).mean(dim=1, keepdim=True)
    return (moved / (size + eps)).amax(dim=0)


def dilate(active: Bool[Tensor, " n"], positions: Int[Tensor, "n 3"], ring: int) -> Bool[Tensor, " n"]:
    """Add all tokens within `ring` rows and columns of an active one in the same frame.

    Raises ValueError if ring is negative.
    """
    if ring < 0:
        raise ValueError(f"ring must be 0 (no neighbors) or more, got {ring}")
    if ring == 0 or not bool(active.any()):
        return active.clone()
    frame, row, column = (positions - positions.amin(dim=0) + ring).unbind(dim=1)  # room for a step over each edge
    width, height = int(column.max()) + 1 + ring, int(row.max()) + 1 + ring
    code = (frame * height + row) * width + column
    steps = torch.arange(-ring, ring + 1, device=positions.device)
    near = torch.zeros(int(code.max()) + 1 + ring * (width + 1), dtype=torch.bool, device=positions.device)
    near[(code[active][:, None] + (steps[:, None] * width + steps).flatten()).flatten()] = True
    return near[code]


def nearness(active: Bool[Tensor, " n"], positions: Int[Tensor, "n 3"]) -> Float[Tensor, " n"]:
    """How near a token is to an active one: highest for the active ones, 0 beyond `NEAREST` rows or columns."""
    return torch.stack([dilate(active, positions, ring) for ring in range(NEAREST + 1)]).float().sum(dim=0)


def bucket_size(num_active: int, num_tokens: int) -> int:
    """The smallest bucket that holds the active tokens: 0 for none, `num_tokens` if everything is to be computed."""
    if num_active == 0:
        return 0
    if num_active > FULL_ABOVE * num_tokens:
        return num_tokens
    sizes = (math.ceil(share * num_tokens) for share in BUCKETS)
    return next(size for size in sizes if size >= num_active)


def fill_bucket(active: Bool[Tensor, " n"], scores: Float[Tensor, " n"], size: int) -> Int[Tensor, " size"]:
    """Indices, rising, of the active tokens and of the others with the highest scores, `size` in all.

    Raises ValueError if the active tokens alone are more.
    """
    if (num := int(active.sum())) > size:
        raise ValueError(f"a bucket of {size} cannot hold {num} active tokens")
    ranked = torch.argsort(scores.masked_fill(active, math.inf), descending=True, stable=True)
    return ranked[:size].sort().values
