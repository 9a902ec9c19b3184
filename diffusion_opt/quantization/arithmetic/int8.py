"""Symmetric integers: one multiplication, one rounding, one division.

    q = clip(round(x s), -2^(b-1), 2^(b-1) - 1),    s = (2^(b-1) - 1) / max|x|,    x ~ q / s

No zero point: a zero stays a zero, and two integers multiply without cross terms (Jacob et al. 2017, arXiv 1712.05877,
has the version with one). What shares a scale is the shape of `amax`: one number for a tensor, (o, 1) for a scale each
output channel of a weight, (…, n, 1) for one each token. Values beyond `amax` saturate; a fixed range that is smaller
than the largest value trades that for finer steps. modelopt multiplies by s and divides by s, in this order, and takes
a range of 2^-24 or less for zero; so does this, which makes the two equal in every bit.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.quantization.arithmetic.finite import finite

NOTHING = 2.0**-24  # a range this small is taken for zero: its numbers become 0


def integers(
    x: Float[Tensor, "*s"], amax: Float[Tensor, "..."], bits: int = 8
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "..."]]:
    """Integers q (as floats) and the factors s of x ~ q / s."""
    top = 2.0 ** (bits - 1) - 1
    empty = amax <= NOTHING
    factor = torch.where(empty, 0.0, torch.full_like(amax, top) / amax)  # number / tensor is rounded twice
    q = (x * factor).round().clamp(-top - 1, top)
    return q, torch.where(empty, 1.0, factor)


def int8(x: Float[Tensor, "*s"], amax: Float[Tensor, "..."], bits: int = 8) -> Float[Tensor, "*s"]:
    """x as symmetric integers of so many bits would hold it; `amax` broadcasts against x and says who shares a scale.

    Raises ValueError for numbers that are inf or NaN.
    """
    finite(x, amax)
    q, factor = integers(x, amax, bits)
    return q / factor
