"""FP8 E4M3: 4 bits of exponent, 3 of mantissa, steps that grow with the number.

    e4m3(z) = 2^(e-3) round(z / 2^(e-3)),   e = max(floor(log2|z|), -6),   |z| <= 448

Between 2^e and 2^(e+1) there are 8 evenly spaced numbers, so the relative error is at most 1/16 over 18 binades; below
2^-6 steps stay at 2^-9 (denormals). Half the codes of INT8 lie in the upper half of its range, of E4M3 just a
sixteenth: FP8 is worse than INT8 for numbers spread evenly, better for those with outliers (Micikevicius et al. 2022,
arXiv 2209.05433). A scale s = 448 / max|x| places the range; modelopt multiplies by s and afterwards by 1 / s, both
rounded to float32, and this does the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.quantization.arithmetic.finite import finite
from diffusion_opt.quantization.arithmetic.int8 import NOTHING

E4M3_MAX = 448.0


def e4m3(z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The nearest E4M3 number, ties to even, saturating at 448."""
    size = z.abs().clamp(max=E4M3_MAX)
    exponent = (torch.frexp(size).exponent - 1).clamp(min=-6)
    step = torch.ldexp(torch.ones_like(size), exponent - 3)
    return torch.copysign((size / step).round() * step, z)


def fp8(x: Float[Tensor, "*s"], amax: Float[Tensor, "..."]) -> Float[Tensor, "*s"]:
    """x in E4M3 under scales that bring `amax` to 448. Raises ValueError for numbers that are inf or NaN."""
    finite(x, amax)
    scale = E4M3_MAX / torch.where(amax <= NOTHING, 1.0, amax)
    return e4m3(x * scale) * (1 / scale)
