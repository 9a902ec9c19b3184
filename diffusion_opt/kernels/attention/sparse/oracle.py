"""Attention over listed tiles in plain PyTorch: gather the listed keys of a row of tiles, attend densely to them.

    out_i = sum_j p_ij v_j,   p_ij = exp(scale q_i . k_j - lse_i)        j over the keys of the tiles listed for i's row

One row of tiles at a time, so time and memory fall with the density of the mask on a CPU too. What attention over the
gathered keys is, and what a query without any key gives (0, lse -inf), says `dense/oracle.py`. The gradients of k
and v are added up where keys were gathered from. Arithmetic is float32 for shorter types, and float64 for float64.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.kernels.attention.dense.oracle import attention, attention_backward
from diffusion_opt.kernels.attention.sparse.masks import BlockMask


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def block_sparse_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: BlockMask,
    scale: float,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """Output in q's type, and natural-log LSE."""
    kind = wide(q.dtype)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=kind)
    for row, queries in enumerate(_rows(mask, q.shape[2])):
        place, real = listed_keys(mask, row, k.shape[2])
        keys, values = _gather(k, place).to(kind), _gather(v, place).to(kind)
        result = attention(q[:, :, queries].to(kind), keys, values, real[:, :, None], scale)
        out[:, :, queries], lse[:, :, queries] = result[0].to(q.dtype), result[1]
    return out, lse


def block_sparse_attention_backward(
    grad_out: Float[Tensor, "b h lq d"],
    grad_lse: Float[Tensor, "b h lq"],
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: BlockMask,
    scale: float,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lk d"], Float[Tensor, "b h lk d"]]:
    """Gradients of q, k and v; `grad_lse` is the gradient that arrives at lse."""
    kind = wide(q.dtype)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=kind) for x in (q, k, v))
    for row, queries in enumerate(_rows(mask, q.shape[2])):
        place, real = listed_keys(mask, row, k.shape[2])
        tensors = (
            grad_out[:, :, queries],
            grad_lse[:, :, queries],
            q[:, :, queries],
            _gather(k, place),
            _gather(v, place),
        )
        dq, dk, dv = attention_backward(*(x.to(kind) for x in tensors), real[:, :, None], scale)
        grad_q[:, :, queries] = dq
        grad_k.scatter_add_(2, _spread(place, dk), dk)
        grad_v.scatter_add_(2, _spread(place, dv), dv)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def listed_keys(mask: BlockMask, row: int, lk: int) -> tuple[Int[Tensor, "b h keys"], Bool[Tensor, "b h keys"]]:
    """Where the keys of a row's list are, and which of these places hold a key; the others say 0."""
    counts = mask.counts[:, :, row, None]
    most = int(counts.max())
    blocks = mask.indices[:, :, row, :most].long()
    listed = torch.arange(most, device=blocks.device) < counts
    blocks = torch.where(listed, blocks, 0)
    slot = torch.arange(mask.block_n, device=blocks.device)
    place = blocks[..., None] * mask.block_n + slot
    real = listed[..., None] & (place < lk)
    if mask.lengths is not None:
        real &= slot < mask.lengths[blocks][..., None]
    return torch.where(real, place, 0).flatten(2), real.flatten(2)


def _rows(mask: BlockMask, lq: int) -> list[slice]:
    return [slice(first, min(first + mask.block_m, lq)) for first in range(0, lq, mask.block_m)]


def _gather(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(2, _spread(place, x))


def _spread(place: Tensor, like: Tensor) -> Tensor:
    """Places (1 or b, 1 or h, keys) as an index (b, h, keys, d)."""
    b, h, _, d = like.shape
    return place[..., None].expand(b, h, -1, d)
