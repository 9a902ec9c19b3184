"""Rounding to INT8, FP8 and NVFP4, in plain PyTorch: the numbers that the low-precision kernels may hold.

    int8    -127 … 127, ties away from zero: trunc(z + sign(z) / 2)
    e4m3    4 bits of exponent, 3 of mantissa: 2^-9 … 448, ties to even, saturating
    e2m1    the FP4 of NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even mantissa, saturating

NVFP4 has two scales: a float32 one for a whole tile and an e4m3 one for each 16 numbers in a row, chosen so that the
largest of the 16 becomes 6 and the largest block scale of the tile becomes 448:

    g = max|tile| / (6 * 448),    s = e4m3(max|16 numbers| / (6 g)),    x ~ g * s * e2m1(x / (g s))

This is NVIDIA's definition as modelopt implements it (`NVFP4QTensor`: its scales and codes are equal to these bit for
bit), with "tensor" replaced by a tile of tokens, so that one pass over memory is enough. A product s * e2m1 has at most
6 significant bits and lies between 2^-10 and 2688, so bfloat16 and float16 hold it exactly: matrix units of any GPU can
multiply NVFP4 numbers without error, and what is simulated elsewhere is exact here up to the order of sums.

Divisions are IEEE divisions here and in the kernels (`div_rn`), and rounding is spelled out, so both give the same
bits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

INT8_MAX = 127.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # the smallest number above 0: no block scale is smaller
E2M1_MAX = 6.0
NVFP4_BLOCK = 16  # neighbors that share an e4m3 scale
NVFP4_MAX = E2M1_MAX * E4M3_MAX


class Nvfp4(NamedTuple):
    """Tiles in NVFP4; `scales[..., None, None] * values` are the numbers they stand for."""

    values: Float[Tensor, "*b n c"]  # e2m1 code times e4m3 block scale, float32, exact in bfloat16 and float16 too
    scales: Float[Tensor, "*b"]  # g of each tile


def round_int8(z: Float[Tensor, "*s"]) -> Int8[Tensor, "*s"]:
    """The nearest integer in -127 … 127, ties away from zero."""
    return (z + torch.copysign(torch.full_like(z, 0.5), z)).trunc().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def round_e4m3(z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The nearest e4m3 number, ties to even, at most 448 in magnitude; in z's type."""
    return z.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(z.dtype)


def round_e2m1(z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The nearest e2m1 number, ties to even, at most 6 in magnitude; in z's type."""
    size = z.abs().clamp(max=E2M1_MAX)
    one = torch.ones_like(size)
    step = torch.where(size < 2, 0.5 * one, torch.where(size < 4, one, 2 * one))
    return torch.copysign((size / step).round() * step, z)


def nonzero(scale: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The scale, 1 where it is 0: there all numbers are 0 and any scale is right."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def block_scales_and_codes(
    z: Float[Tensor, "*b k"], unit: Float[Tensor, "*#b"]
) -> tuple[Float[Tensor, "*b blocks"], Float[Tensor, "*b k"]]:
    """e4m3 scales of blocks of 16 along the last axis, and e2m1 codes, for numbers measured in `unit` (g above).

    Raises ValueError if the last axis is no multiple of 16.
    """
    if z.shape[-1] % NVFP4_BLOCK:
        raise ValueError(f"NVFP4 has blocks of {NVFP4_BLOCK}: pad the {z.shape[-1]} numbers of a row to a multiple")
    blocks = z.unflatten(-1, (-1, NVFP4_BLOCK))
    unit = unit[..., None]
    scales = round_e4m3((blocks.abs().amax(-1) / (E2M1_MAX * unit)).clamp(min=E4M3_MIN))
    return scales, round_e2m1(blocks / (scales * unit)[..., None]).flatten(-2)


def nvfp4_tiles(tiles: Float[Tensor, "*b n c"], along: int) -> Nvfp4:
    """Tiles (n, c) to NVFP4, with blocks of 16 along axis -1 or -2; that axis must be a multiple of 16."""
    rows = tiles if along == -1 else tiles.mT
    unit = nonzero(tiles.abs().amax((-2, -1)) / NVFP4_MAX)
    scales, codes = block_scales_and_codes(rows, unit[..., None])
    values = codes * scales.repeat_interleave(NVFP4_BLOCK, -1)
    return Nvfp4(values if along == -1 else values.mT, unit)
