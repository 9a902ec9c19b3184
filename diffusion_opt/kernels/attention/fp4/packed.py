"""NVFP4 as matrix units with FP4 instructions read it: two codes a byte, and a byte for the scale of 16 codes.

    code    sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 (e2m1), the first of two neighbors in the lower half of a byte
    scale   e4m3, for 16 codes in a row
    unit    float32, for a tile of tokens; multiplied outside of the matrix unit

The numbers are those of `quantizers/oracle.py`, bit for bit; only how they lie in memory differs. Neighbors are what is
summed over: channels for q and k, keys for v. Sequences are padded with zeros to whole tiles. This is plain PyTorch, a
few passes over q, k and v on the device where they lie.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from diffusion_opt.kernels.attention.fp4.oracle import Smoothing, correction
from diffusion_opt.kernels.quantizers.formats import NVFP4_BLOCK, NVFP4_MAX, block_scales_and_codes, nonzero
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK, QUERY_BLOCK, block_means, smoothing_mean


class Packed(NamedTuple):
    """Codes, block scales and units of one operand."""

    codes: UInt8[Tensor, "b h rows half"]
    scales: Tensor  # (b, h, rows, half / 8), float8_e4m3fn
    units: Float[Tensor, "b h tiles"]


class PackedOperands(NamedTuple):
    """What FP4 attention multiplies: q and k have a row for each token, v one for each channel."""

    q: Packed
    k: Packed
    v: Packed
    given_back: Float[Tensor, "b h query_tiles lk"] | None  # m (k - kbar)^T, for smoothed q


def pack(q: Tensor, k: Tensor, v: Tensor, smoothing: Smoothing) -> PackedOperands:
    """The operands of `oracle.prepare`, packed. Heads are a multiple of 16 numbers."""
    k_mean = None if smoothing == "none" else smoothing_mean(k)[:, :, None]
    q_mean = block_means(q) if smoothing == "qk" else None
    a = packed_nvfp4(q, QUERY_BLOCK, "channels", q_mean)
    b = packed_nvfp4(k, KEY_BLOCK, "channels", k_mean)
    return PackedOperands(a, b, packed_nvfp4(v, KEY_BLOCK, "tokens"), correction(q_mean, k, k_mean))


def packed_nvfp4(
    x: Float[Tensor, "b h l d"],
    tile: int,
    along: Literal["channels", "tokens"],
    mean: Float[Tensor, "b h #tiles d"] | None = None,
) -> Packed:
    """NVFP4 of x - mean in tiles of `tile` tokens. Raises ValueError for heads that are no multiple of 16."""
    length, d = x.shape[2:]
    if d % NVFP4_BLOCK:
        raise ValueError(f"packed NVFP4 has blocks of {NVFP4_BLOCK} channels, heads of {d} are no multiple")
    tiles = F.pad(x.float(), (0, 0, 0, -length % tile)).unflatten(2, (-1, tile))
    if mean is not None:
        real = torch.arange(tiles.shape[2] * tile, device=x.device).view(-1, tile, 1) < length
        tiles = torch.where(real, tiles - mean[:, :, :, None], 0.0)
    units = nonzero(tiles.abs().amax((-2, -1)) / NVFP4_MAX)
    rows = tiles if along == "channels" else tiles.mT
    scales, codes = block_scales_and_codes(rows, units[..., None])
    parts = (nibbles(codes), scales.to(torch.float8_e4m3fn))
    if along == "channels":
        return Packed(*(part.flatten(2, 3).contiguous() for part in parts), units)
    return Packed(*(part.transpose(2, 3).flatten(3).contiguous() for part in parts), units)


def nibbles(values: Float[Tensor, "*b n"]) -> UInt8[Tensor, "*b half"]:
    """The bytes of e2m1 numbers, two each."""
    size = values.abs()
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4)).to(torch.uint8)
    code = code | (values.signbit().to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)
