"""RMS normalization of queries or keys and their rotation by position, in plain PyTorch, as diffusers does them.

    z = w x / sqrt(mean(x^2) + eps)                     mean over a head (FLUX.2) or over all heads (Wan, LTX-2)
    y_1 = z_1 cos - z_2 sin,   y_2 = z_2 cos + z_1 sin  for each pair of channels (Su et al. 2021, arXiv 2104.09864)

Families differ in two ways, both hidden here. A pair is two neighbors (2i, 2i + 1), or, in LTX-2's split form, the same
place in the two halves of a head (i, i + d/2). And cos and sin come in four shapes, with each number twice in three of
them. `Rotation` has one shape, one number for a pair; the functions below make it from diffusers' tables as views,
without copying. diffusers rounds to the type of x after the norm and again after the rotation; here only the result is
rounded, so in float32 the two agree to the last bits and in bfloat16 this is the more exact one.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Pairs = Literal["neighbors", "halves"]


class Rotation(NamedTuple):
    """Angles of a rotary embedding."""

    cos: Float[Tensor, "#b #h l r"]  # r = d / 2 pairs; any strides
    sin: Float[Tensor, "#b #h l r"]
    pairs: Pairs


def flux2_rotation(cos: Float[Tensor, "l d"], sin: Float[Tensor, "l d"]) -> Rotation:
    """From the tables of `Flux2PosEmbed` (and those of FLUX.1): each number twice, for all heads."""
    return Rotation(cos[None, None, :, 0::2], sin[None, None, :, 0::2], "neighbors")


def wan_rotation(cos: Float[Tensor, "1 l 1 d"], sin: Float[Tensor, "1 l 1 d"]) -> Rotation:
    """From the tables of `WanRotaryPosEmbed`: each number twice, for all heads."""
    return Rotation(cos[..., 0::2].transpose(1, 2), sin[..., 1::2].transpose(1, 2), "neighbors")


def ltx2_rotation(cos: Float[Tensor, "b ..."], sin: Float[Tensor, "b ..."], num_heads: int) -> Rotation:
    """From the tables of `LTX2AudioVideoRotaryPosEmbed`: (b, h, l, r), or (b, l, h d) with each number twice."""
    if cos.ndim == 4:
        return Rotation(cos, sin, "halves")
    by_head = [table.unflatten(-1, (num_heads, -1))[..., 0::2].transpose(1, 2) for table in (cos, sin)]
    return Rotation(*by_head, "neighbors")


def inverse_rms(x: Float[Tensor, "b h l d"], weight: Float[Tensor, " w"], eps: float) -> Float[Tensor, "b #h l 1"]:
    """1 / sqrt(mean(x^2) + eps) for a head, or for all heads if there is a weight for each of their channels."""
    axes = (-1,) if len(weight) == x.shape[-1] else (1, 3)
    return (x.square().mean(axes, keepdim=True) + eps).rsqrt()


def rotate(x: Float[Tensor, "b h l d"], rotation: Rotation, inverse: bool = False) -> Float[Tensor, "b h l d"]:
    """Turn each pair of channels by its angle, or back."""
    first, second = split_pairs(x, rotation.pairs)
    cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)
    if inverse:
        sin = -sin
    return join_pairs(first * cos - second * sin, second * cos + first * sin, rotation.pairs)


def split_pairs(x: Float[Tensor, "*b d"], pairs: Pairs) -> tuple[Float[Tensor, "*b r"], Float[Tensor, "*b r"]]:
    """The first and the second channel of each pair."""
    return (x[..., 0::2], x[..., 1::2]) if pairs == "neighbors" else x.chunk(2, -1)


def join_pairs(first: Float[Tensor, "*b r"], second: Float[Tensor, "*b r"], pairs: Pairs) -> Float[Tensor, "*b d"]:
    """Undo `split_pairs`."""
    return torch.stack((first, second), -1).flatten(-2) if pairs == "neighbors" else torch.cat((first, second), -1)


def by_head(weight: Float[Tensor, " w"], x: Float[Tensor, "b h l d"]) -> Float[Tensor, "#h 1 d"]:
    """The weight as it multiplies x."""
    return weight.to(x.dtype).unflatten(0, (-1, x.shape[-1]))[:, None]


def norm_rope(
    x: Float[Tensor, "b h l d"], weight: Float[Tensor, " w"], rotation: Rotation | None, eps: float
) -> Float[Tensor, "b h l d"]:
    """Normalized and rotated, in float32 (float64 for float64). The weight has d numbers, or h d for all heads."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = x * inverse_rms(x, weight, eps) * by_head(weight, x)
    return normed if rotation is None else rotate(normed, rotation)


def norm_rope_backward(
    grad: Float[Tensor, "b h l d"],
    x: Float[Tensor, "b h l d"],
    weight: Float[Tensor, " w"],
    rotation: Rotation | None,
    eps: float,
) -> tuple[Float[Tensor, "b h l d"], Float[Tensor, " w"]]:
    """Gradients of x and the weight, in float32: turn back, then the gradient of the norm.

    With n = x / rms and g = w dz,  dx = (g - n mean(g n)) / rms,  dw = sum over tokens of dz n.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    x, grad = x.to(kind), grad.to(kind)
    if rotation is not None:
        grad = rotate(grad, rotation, inverse=True)
    inverse = inverse_rms(x, weight, eps)
    normed, weighted = x * inverse, grad * by_head(weight, x)
    across = len(weight) != x.shape[-1]
    grad_x = inverse * (weighted - normed * (weighted * normed).mean((1, 3) if across else (-1,), keepdim=True))
    grad_weight = (grad * normed).sum((0, 2) if across else (0, 1, 2)).flatten()
    return grad_x, grad_weight
