"""Region attention in plain PyTorch: what `operator.py` must compute, without its in-place writes.

    cache' = cache with rows[i] at token index[i],      out_i = softmax(scale q_i k'^T) v'

The result on a region is the result of attention on all tokens, at the region's rows, if the cache holds the keys and
values of all the others. Places of the index that are -1 (a batch entry with a smaller region) write nothing, and give
0 and lse -inf.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.kernels.attention.dense.oracle import attention
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.oracle import block_sparse_attention, wide


def with_rows(
    cache: Float[Tensor, "b h l d"], rows: Float[Tensor, "b h n d"], index: Int[Tensor, "b n"]
) -> Float[Tensor, "b h l d"]:
    """A copy of the cache with the rows at their tokens."""
    b, h, length, d = cache.shape
    room = torch.cat([cache, cache.new_empty(b, h, 1, d)], dim=2)  # an extra token takes what belongs nowhere
    target = torch.where(index < 0, length, index).long()[:, None, :, None]
    return room.scatter(2, target.expand(rows.shape), rows)[:, :, :length]


def region_attention(
    q: Float[Tensor, "b h n d"],
    k_cache: Float[Tensor, "b h l d"],
    v_cache: Float[Tensor, "b h l d"],
    index: Int[Tensor, "b n"],
    mask: BlockMask | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
    """Output and lse of the active queries against the whole cache, or against the tiles of the mask."""
    if mask is None:
        kind = wide(q.dtype)
        out, lse = attention(q.to(kind), k_cache.to(kind), v_cache.to(kind), None, scale)
        out = out.to(q.dtype)
    else:
        out, lse = block_sparse_attention(q, k_cache, v_cache, mask, scale)
    absent = (index < 0)[:, None]
    return torch.empty_like(q).copy_(out.masked_fill(absent[..., None], 0)), lse.masked_fill(absent, -torch.inf)
