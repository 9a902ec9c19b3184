"""Numbers of a format as the bytes that hold them, and back: what a packed weight is made of.

    numbers            codes                            scales                              range
    INT8 a channel     int8 (o, i)                                                          float32 (o, 1)
    INT4 in blocks     two a byte, uint8 (o, i / 2)                                         float32 (o, blocks)
    E4M3               float8_e4m3fn (o, i)                                                 float32 () or (o, 1)
    MXFP8              float8_e4m3fn (o, i)             exponent + 127, uint8 (o, blocks)
    NVFP4              two a byte, uint8 (o, i / 2)     float8_e4m3fn (o, blocks)           float32 ()

The range of integers is the largest magnitude their codes reach (modelopt's amax); that of floats is what their codes
are multiplied with. Bytes of two hold the even column in the low half, as modelopt's and Black Forest Labs' checkpoints
do. INT4 codes are two's complement; E2M1 codes are a sign and the place of the magnitude in `arithmetic.nvfp4.E2M1`.
The last block of a row may be shorter.

`decode` multiplies and divides in the order in which modelopt does (a / b and a * (1 / b) differ in the last bit), so
what is decoded equals modelopt's simulation bit for bit, and so does everything computed from it.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from diffusion_opt.kernels.quantizers.formats import E4M3_MAX, NVFP4_MAX, block_scales_and_codes, nonzero
from diffusion_opt.quantization.arithmetic.int8 import NOTHING, integers
from diffusion_opt.quantization.arithmetic.mx import exponents
from diffusion_opt.quantization.arithmetic.nvfp4 import E2M1
from diffusion_opt.quantization.formats import Numbers

EXPONENT_BIAS = 127  # of the stored exponents of MX scales

Shape = tuple[int, ...]


class Encoded(NamedTuple):
    """The bytes of one matrix; types and shapes are those of the table above."""

    codes: Tensor
    scales: Tensor | None = None
    range: Tensor | None = None


def layout(numbers: Numbers, rows: int, columns: int) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and type of each tensor of `Encoded` for a matrix (rows, columns), without those there are not.

    Raises ValueError for numbers that have no packed form.
    """
    kind, blocks = _kind(numbers), -(-columns // numbers.block) if numbers.block else 1
    halves = (rows, -(-columns // 2))
    if kind == "nvfp4":
        scales = {"scales": ((rows, blocks), torch.float8_e4m3fn), "range": ((), torch.float32)}
        return {"codes": (halves, torch.uint8), **scales}
    if kind == "mx":
        return {"codes": ((rows, columns), torch.float8_e4m3fn), "scales": ((rows, blocks), torch.uint8)}
    ranges = {"range": (() if numbers.per == "tensor" else (rows, blocks), torch.float32)}
    if numbers.bits == 4:
        return {"codes": (halves, torch.uint8), **ranges}
    return {"codes": ((rows, columns), torch.float8_e4m3fn if kind == "e4m3" else torch.int8), **ranges}


def encode(x: Float[Tensor, "o i"], numbers: Numbers, amax: Float[Tensor, "..."] | None = None) -> Encoded:
    """The bytes of a matrix, with the calibrated range of the tensor, its channels or its blocks; MX takes none.

    Raises ValueError for numbers that have no packed form.
    """
    kind, columns = _kind(numbers), x.shape[1]
    blocks = _blocks(x.float(), numbers.block or columns)
    if kind == "nvfp4":
        unit = nonzero(amax.float().amax() / NVFP4_MAX)
        scales, codes = block_scales_and_codes(blocks.flatten(1), unit[None])
        return Encoded(_pairs(_e2m1_codes(codes)[:, :columns]), scales.to(torch.float8_e4m3fn), unit)
    if kind == "mx":
        exponent = exponents(blocks)
        codes = (blocks * torch.exp2(-exponent)).flatten(1)[:, :columns].clamp(-E4M3_MAX, E4M3_MAX)
        return Encoded(codes.to(torch.float8_e4m3fn), (exponent[..., 0] + EXPONENT_BIAS).to(torch.uint8))
    amax = amax.float().reshape(layout(numbers, *x.shape)["range"][0]).clone()
    if kind == "e4m3":
        factor = E4M3_MAX / torch.where(amax <= NOTHING, 1.0, amax)
        codes = (x.float() * factor).clamp(-E4M3_MAX, E4M3_MAX)
        return Encoded(codes.to(torch.float8_e4m3fn), range=1 / factor)
    codes = integers(blocks, amax[..., None], numbers.bits)[0].flatten(1).to(torch.int8)
    if numbers.bits == 4:
        return Encoded(_pairs(codes[:, :columns].view(torch.uint8) & 15), range=amax)
    return Encoded(codes[:, :columns], range=amax)


def decode(encoded: Encoded, numbers: Numbers, columns: int) -> Float[Tensor, "o i"]:
    """The float32 matrix (rows, columns) that the bytes stand for."""
    kind = _kind(numbers)
    codes = _halves(encoded.codes)[:, :columns] if numbers.bits == 4 else encoded.codes
    if kind == "nvfp4":
        steps = encoded.scales.float() * encoded.range
        values = torch.cat([E2M1, -E2M1]).to(codes.device)[codes.long()]
        return (_blocks(values, numbers.block) * steps[..., None]).flatten(1)[:, :columns]
    if kind == "mx":
        steps = torch.exp2(encoded.scales.float() - EXPONENT_BIAS)
        return (_blocks(codes.float(), numbers.block) * steps[..., None]).flatten(1)[:, :columns]
    if kind == "e4m3":
        return codes.float() * encoded.range
    if numbers.bits == 4:
        codes = (codes << 4).view(torch.int8) >> 4  # a half in two's complement: its highest bit is its sign
    blocks = _blocks(codes.float(), numbers.block or columns)
    top = torch.full_like(encoded.range, 2.0 ** (numbers.bits - 1) - 1)
    factor = torch.where(encoded.range <= NOTHING, 1.0, top / encoded.range)
    return (blocks / factor[..., None]).flatten(1)[:, :columns]


def _kind(numbers: Numbers) -> Literal["integer", "e4m3", "mx", "nvfp4"]:
    if numbers.num_bits in (4, 8) and numbers.scale_bits is None:
        return "integer"
    kinds = {((4, 3), None): "e4m3", ((4, 3), (8, 0)): "mx", ((2, 1), (4, 3)): "nvfp4"}
    if (kind := kinds.get((numbers.num_bits, numbers.scale_bits))) is None:
        raise ValueError(f"there is no packed form of {numbers}: INT8, INT4, E4M3, MXFP8 and NVFP4 have one")
    return kind


def _blocks(x: Float[Tensor, "o i"], block: int) -> Float[Tensor, "o blocks block"]:
    return F.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))


def _e2m1_codes(x: Float[Tensor, "o i"]) -> UInt8[Tensor, "o i"]:
    """The 4-bit codes of numbers that are E2M1 exactly."""
    places = torch.searchsorted(E2M1.to(x.device), x.abs())
    return (places + 8 * x.signbit()).to(torch.uint8)


def _pairs(codes: UInt8[Tensor, "o i"]) -> UInt8[Tensor, "o half"]:
    """Two 4-bit codes a byte, the even column low."""
    even, odd = F.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(-1)
    return even | odd << 4


def _halves(pairs: UInt8[Tensor, "o half"]) -> UInt8[Tensor, "o i"]:
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)
