"""MX: blocks of 32 numbers under a scale that is a power of two (Rouhani et al. 2023, arXiv 2310.10537).

    x ~ 2^k e4m3(x / 2^k),     k = ceil(log2(max|32 neighbors| / 448))

A power of two has no mantissa to store (8 bits of exponent, "E8M0") and none to multiply with: scaling is exact, and
only the rounding of the element is an error. The price is that the largest number of a block lands anywhere between 224
and 448. modelopt and NVIDIA's hardware round k up, so nothing saturates; the open standard, and torchao after it,
rounds down, and cuts off the largest numbers of some blocks. NVFP4 takes a finer scale instead (`nvfp4.py`). How an
element is rounded stands in `fp8.py`; the cast of PyTorch, used here, is equal to it and faster.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.kernels.quantizers.formats import E4M3_MAX, round_e4m3
from diffusion_opt.quantization.arithmetic.finite import finite


def exponents(blocks: Float[Tensor, "*b k"]) -> Float[Tensor, "*b 1"]:
    """k of each row; -127, the smallest there is, for a row of zeros."""
    ratio = blocks.abs().amax(-1, keepdim=True) / E4M3_MAX
    return torch.where(ratio > 0, ratio.log2(), -127.0).ceil().clamp(-127, 127)


def mxfp8_blocks(blocks: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """Each row of k numbers in E4M3 under a power of two of its own."""
    k = exponents(blocks)
    return round_e4m3(blocks * torch.exp2(-k)) * torch.exp2(k)


def mxfp8(x: Float[Tensor, "*s n"], block: int = 32) -> Float[Tensor, "*s n"]:
    """x in MXFP8, blocks along the last axis. Raises ValueError for numbers that are inf or NaN."""
    finite(x)
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return mxfp8_blocks(blocks).flatten(-2)[..., : x.shape[-1]]
