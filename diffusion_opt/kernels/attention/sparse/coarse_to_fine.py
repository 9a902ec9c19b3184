"""Sparse attention that is learned: a coarse attention between tiles chooses the tiles of the fine one.

Video sparse attention (VSA; Zhang et al. 2025, arXiv 2505.13389, section 2) for tokens packed into tiles:

    P_c = softmax(scale pool(q) pool(k)^T)        attention between the means of tiles
    O_c = P_c pool(v)                             its output, the same for all tokens of a tile
    O_s = sparse attention of each tile to the `keep` tiles with the largest P_c
    O   = gate * O_c + O_s                        the gate is computed from the hidden states, per token and channel

The choice of tiles has no gradient; through O_c and the gate the coarse attention has one, so q and k learn to choose
well, and what the sparse part leaves out is there at the resolution of tiles. A gate of zero starts from plain sparse
attention, which is how a trained model is turned into one of these.

FastVideo's kernels do this for tiles of 64 tokens on Hopper; here any tile, any device, one function.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import checked_scale
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.operator import block_sparse_attention
from diffusion_opt.kernels.attention.sparse.packing import TokenTiles
from diffusion_opt.kernels.attention.sparse.predicted_masks import keep_largest, pool


def coarse_to_fine_attention(
    q: Float[Tensor, "b h slots d"],
    k: Float[Tensor, "b h slots d"],
    v: Float[Tensor, "b h slots d"],
    gate: Float[Tensor, "b h slots d"],
    tiles: TokenTiles,
    keep: float,
    scale: float | None = None,
) -> Float[Tensor, "b h slots d"]:
    """VSA of packed tokens, differentiable in q, k, v and gate; slots without a token hold nothing of use.

    `keep` is the share of tiles each tile attends to in full, above 0 and at most 1; `scale` is 1 / sqrt(d) unless
    given. Raises ValueError if the tensors are not packed by these tiles.
    """
    if q.shape[2] != tiles.num_slots:
        raise ValueError(f"these tiles have {tiles.num_slots} slots, got {q.shape[2]}: pack q, k, v and gate first")
    scale = checked_scale(q, k, v, None, scale)
    if k.shape != q.shape or gate.shape != q.shape:
        raise ValueError(f"q, k, v and gate are packed alike, got {[tuple(x.shape) for x in (q, k, v, gate)]}")
    coarse_q, coarse_k, coarse_v = (pool(x, tiles.block, tiles.lengths) for x in (q, k, v))
    probabilities = (coarse_q @ coarse_k.mT * scale).softmax(-1)
    coarse = (probabilities @ coarse_v).repeat_interleave(tiles.block, dim=2)
    table = keep_largest(probabilities.detach(), keep)
    mask = BlockMask.from_dense(table, tiles.block, tiles.block, tiles.lengths)
    fine, _ = block_sparse_attention(q, k, v, mask, scale)
    return torch.addcmul(fine, gate, coarse)
