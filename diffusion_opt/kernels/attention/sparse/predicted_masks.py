"""Masks from q and k themselves: the tiles where attention is expected to be large, found from block averages.

SpargeAttn (Zhang et al. 2025, arXiv 2502.18137): average q and k over each block and attend between the averages,

    P = softmax(pool(q) pool(k)^T scale)        one row for each block of queries, 1 / (block_m block_n) of the scores

then keep, of each row, the largest entries: a fixed share (`keep`), or as many as hold a share of the probability
(`mass`). An average stands for its block only if the block's tokens are alike. That is measured by their mean cosine,

    similarity = mean over i, j of cos(x_i, x_j) = |mean over i of x_i / |x_i||^2

which needs no table of pairs. A block below the limit is not judged: its row or its column is computed in full, and
columns not judged take no probability from the others.

The authors' kernel skips in addition, while it runs, the product with V of tiles whose scores turn out small. This is
left out here: what is computed would then depend on the order of tiles, and the list would no longer say the work.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import checked_scale
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.oracle import wide


def pool(
    x: Float[Tensor, "b h l d"], block: int, lengths: Int[Tensor, " blocks"] | None = None
) -> Float[Tensor, "b h blocks d"]:
    """Mean of the real tokens of each block: the first `lengths` of it, or all, with a shorter last block."""
    sums, counts = _block_sums(x, block, lengths)
    return (sums / counts[:, None]).to(x.dtype)


def similarity(
    x: Float[Tensor, "b h l d"], block: int, lengths: Int[Tensor, " blocks"] | None = None
) -> Float[Tensor, "b h blocks"]:
    """Mean cosine between the real tokens of each block, each with itself included: 1 if all point the same way."""
    sums, counts = _block_sums(torch.nn.functional.normalize(x.to(wide(x.dtype)), dim=-1), block, lengths)
    return (sums / counts[:, None]).square().sum(-1)


def _block_sums(x: Tensor, block: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    num_blocks = -(-x.shape[2] // block)
    padded = torch.nn.functional.pad(x, (0, 0, 0, num_blocks * block - x.shape[2])).unflatten(2, (num_blocks, block))
    if lengths is None:
        starts = torch.arange(num_blocks, device=x.device) * block
        lengths = (x.shape[2] - starts).clamp(max=block)
    real = torch.arange(block, device=x.device) < lengths[:, None]
    sums = (padded * real[..., None].to(x.dtype)).sum(3, dtype=wide(x.dtype))
    return sums, lengths.clamp(min=1).to(sums.dtype)


def keep_largest(scores: Float[Tensor, "b h rows columns"], keep: float) -> Bool[Tensor, "b h rows columns"]:
    """The share `keep` of each row with the largest scores, at least one. Raises ValueError outside (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a share of the tiles above 0, at most 1, got {keep}")
    number = max(1, math.ceil(keep * scores.shape[-1]))
    best = scores.topk(number, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def keep_mass(probabilities: Float[Tensor, "b h rows columns"], mass: float) -> Bool[Tensor, "b h rows columns"]:
    """The fewest entries of each row whose sum is `mass` or more. Raises ValueError outside (0, 1]."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass is a share of the probability above 0, at most 1, got {mass}")
    ordered, order = probabilities.sort(dim=-1, descending=True)
    needed = ordered.cumsum(-1) - ordered < mass  # what came before is not enough
    return torch.zeros_like(needed).scatter(-1, order, needed)


@torch.no_grad()
def predicted_mask(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    block_m: int,
    block_n: int,
    *,
    keep: float | None = None,
    mass: float | None = None,
    least_similarity: float = 0.0,
    lengths: Int[Tensor, " columns"] | None = None,
    scale: float | None = None,
) -> BlockMask:
    """The mask SpargeAttn predicts: by share of tiles (`keep`) or by share of probability (`mass`), one of the two.

    Blocks whose `similarity` is below `least_similarity` (0 to 1; 0 asks for nothing) are computed in full. `lengths`
    is for q and k packed by the same `TokenTiles`; `scale` is 1 / sqrt(d) unless given. Raises ValueError unless one
    of keep and mass is given, if lengths come with blocks that are not square or are not one for each block, and for q
    and k that do not fit together.
    """
    if (keep is None) == (mass is None):
        raise ValueError(f"give either keep or mass, got keep={keep}, mass={mass}")
    if lengths is not None and block_m != block_n:
        raise ValueError(f"packed tokens have blocks of one size, got {block_m} x {block_n}")
    for name, x, block in (("q", q, block_m), ("k", k, block_n)):
        blocks = -(-x.shape[2] // block)
        if lengths is not None and len(lengths) != blocks:
            raise ValueError(f"{x.shape[2]} tokens of {name} are {blocks} blocks, lengths are given for {len(lengths)}")
    scale = checked_scale(q, k, k, None, scale)
    q_apart = similarity(q, block_m, lengths) < least_similarity
    k_apart = (similarity(k, block_n, lengths) < least_similarity)[..., None, :]
    scores = pool(q, block_m, lengths) @ pool(k, block_n, lengths).mT * scale
    probabilities = scores.masked_fill(k_apart, -torch.inf).softmax(-1).nan_to_num(0.0)  # NaN: no block to judge
    table = keep_largest(probabilities, keep) if mass is None else keep_mass(probabilities, mass)
    return BlockMask.from_dense(table | q_apart[..., None] | k_apart, block_m, block_n, lengths)
