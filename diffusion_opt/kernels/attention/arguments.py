"""What every attention of this room asks of its arguments: shapes, types, scale and mask, checked once at the door.

The kernels address memory by the strides they are given and would read whatever lies there, so nothing that does not
fit may get past the public functions. Masks are expanded, not copied: a mask broadcast over batch, heads or queries
keeps a stride of 0 along them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CLOSED_BELOW = -2.3e38  # a bias below is a closed door; times log2(e) it would leave the range of float32

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]  # True is open; or a bias added to the scores


def closed_keys(mask: Mask) -> Bool[Tensor, "..."]:
    """Where a mask lets nothing through."""
    return ~mask if mask.dtype == torch.bool else mask < CLOSED_BELOW


def checked_scale(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> float:
    """The scale, 1 / sqrt(d) if None. Raises ValueError if the arguments do not fit together."""
    b, h, lq, d = q.shape
    lk = k.shape[2]
    if k.shape != v.shape or k.shape != (b, h, lk, d):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q of shape (b, h, lq, d) needs k and v of shape (b, h, lk, d), got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one type, got {q.dtype}, {k.dtype}, {v.dtype}: convert them to one")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be positive, got {scale:g}; put the sign into q")
    if mask is not None and mask.requires_grad:
        raise ValueError("the mask requires a gradient and none is computed for it: detach it, or use torch's SDPA")
    if mask is not None and not _broadcasts(mask.shape, (b, h, lq, lk)):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not broadcast to (b, h, lq, lk) {(b, h, lq, lk)}")
    return d**-0.5 if scale is None else scale


def expanded_mask(mask: Mask | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a view of shape (b, h, lq, lk)."""
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _broadcasts(shape: torch.Size, to: tuple[int, ...]) -> bool:
    sizes = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(sizes) == len(to) and all(size in (1, wanted) for size, wanted in zip(sizes, to, strict=True))
