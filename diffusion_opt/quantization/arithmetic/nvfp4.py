"""NVFP4: four bits per number, and two scales.

    E2M1     0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: all that four bits hold
    s_block  E4M3, one for each 16 neighbors:  e4m3(max|16 neighbors| / (6 g))
    g        float32, one for the tensor:      max|x| / (6 * 448)

    x ~ g s_block e2m1(x / (g s_block))

The block scale brings the largest of 16 numbers to about 6, the tensor scale the largest block scale to 448, the top of
E4M3. A weight costs 4 + 8 / 16 = 4.5 bits. MXFP4 has blocks of 32 and scales that are powers of two: cheaper, coarser.

This looks numbers up in the table of eight; `kernels/quantizers/formats.py` computes the same with shifts of the step
size, as a kernel does, and modelopt's `NVFP4QTensor` by comparing with seven bounds. All three agree in every bit.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.quantization.arithmetic.finite import finite
from diffusion_opt.quantization.arithmetic.fp8 import E4M3_MAX, e4m3

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 16


def e2m1(z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The nearest of the sixteen numbers; halfway between two, the one whose last bit is 0."""
    middles = ((E2M1[1:] + E2M1[:-1]) / 2).to(z.device)
    below, above = (torch.bucketize(z.abs(), middles, right=right) for right in (False, True))
    index = torch.where(below % 2 == 0, below, above)  # they differ where z is halfway
    return torch.copysign(E2M1.to(z)[index], z)


def nvfp4(x: Float[Tensor, "*s n"], amax: Float[Tensor, ""] | None = None) -> Float[Tensor, "*s n"]:
    """x in NVFP4, blocks along the last axis; `amax` is a calibrated range, None that of x.

    Raises ValueError for numbers that are inf or NaN.
    """
    finite(x)
    largest = x.abs().amax() if amax is None else amax
    g = largest / (6 * E4M3_MAX)
    g = torch.where(g == 0, 1.0, g)  # all zeros: any scale is right
    blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = e4m3((blocks.abs().amax(-1, keepdim=True) / (6 * g)).clamp(min=2**-9)) * g
    return (e2m1(blocks / scale) * scale).flatten(-2)[..., : x.shape[-1]]
