"""What every attention of this room asks of its arguments: shapes, types, scale and mask, checked once at the door.

The kernels address memory by the strides they are given and would read whatever lies there, so nothing that does not
fit may get past the public functions. Masks are expanded, not copied: a mask broadcast over batch, heads or queries
keeps a stride of 0 along them.

Two things that look like masks are told apart by their type alone. True and False open and close; floating-point
numbers are added to the scores. Integers could be either, and a tokenizer's mask of 0 and 1 taken for a bias would
leave every key open, so they are refused, as torch's `scaled_dot_product_attention` refuses them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CLOSED_BELOW = -2.3e38  # a bias from here on is a closed door; times log2(e) it would leave the range of float32
BIAS_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT32 = torch.finfo(torch.float32)

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]  # True is open; or a bias added to the scores


def closed_keys(mask: Mask) -> Bool[Tensor, "..."]:
    """Where a mask lets nothing through: False, or a bias of -inf or of the least number of its type.

    Raises ValueError for a mask that is neither bool nor floating.
    """
    check_mask_type(mask)
    return ~mask if mask.dtype == torch.bool else mask <= max(CLOSED_BELOW, torch.finfo(mask.dtype).min)


def check_mask_type(mask: Tensor) -> None:
    """Raise ValueError unless the mask is bool, or a bias in a type the kernels read."""
    if mask.dtype != torch.bool and mask.dtype not in BIAS_TYPES:
        raise ValueError(
            f"a mask is bool (True is open) or a floating-point bias, got {mask.dtype}: 0 and 1 could mean either, so "
            "write mask.bool() for a mask of kept keys, mask.float() for a bias"
        )


def checked_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> float:
    """The scale, 1 / sqrt(d) if None. Raises ValueError if the arguments do not fit together."""
    if q.ndim != 4 or 0 in q.shape[-1:]:
        raise ValueError(f"q has the shape (b, h, lq, d) with d of 1 or more, got {tuple(q.shape)}")
    b, h, lq, d = q.shape
    if k.ndim != 4 or k.shape != v.shape or k.shape != (b, h, k.shape[2], d):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q of shape (b, h, lq, d) needs k and v of shape (b, h, lk, d), got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v need one type, a float, got {q.dtype}, {k.dtype}, {v.dtype}: convert them to one")
    places = {x.device for x in (q, k, v, mask) if x is not None}
    if len(places) > 1:
        raise ValueError(f"q, k, v and the mask lie on {sorted(map(str, places))}: move them to one device")
    if mask is not None:
        _check_mask(mask, (b, h, lq, k.shape[2]))
    scale = d**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale:g}; put the sign into q")
    if not FLOAT32.tiny <= scale <= FLOAT32.max / 2:
        raise ValueError(f"scale {scale:g} is not a number that the kernels' float32 can hold and multiply with")
    return scale


def _check_mask(mask: Tensor, scores: tuple[int, int, int, int]) -> None:
    check_mask_type(mask)
    if mask.requires_grad:
        raise ValueError("the mask requires a gradient and none is computed for it: detach it, or use torch's SDPA")
    if not _broadcasts(mask.shape, scores):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not broadcast to (b, h, lq, lk) {scores}")


def expanded_mask(mask: Mask | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a view of shape (b, h, lq, lk)."""
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _broadcasts(shape: torch.Size, to: tuple[int, ...]) -> bool:
    sizes = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(sizes) == len(to) and all(size in (1, wanted) for size, wanted in zip(sizes, to, strict=True))
