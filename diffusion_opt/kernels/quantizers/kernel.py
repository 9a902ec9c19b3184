"""The quantizers of q, k, v as Triton kernels: one pass over memory each, the bits of `oracle.py`.

    tokens_kernel     INT8 or FP8 with a scale for each group of tokens, the smoothing mean taken off on the way
    channels_kernel   FP8 with a given scale for each channel, written with tokens as neighbors
    nvfp4_kernel      NVFP4 of one tile of tokens, with blocks of 16 along channels or along tokens

A program holds its tile of one head in registers, so largest numbers and scales need no second look at memory. Groups
that interleave (every eighth query; pairs of keys) are axes of the reshaped tile:

    tokens (tile) -> (windows, repeats, groups, run),     largest over axes 1 and 3

FP8 matrix units on sm_90 want both factors with the summed index contiguous; for weights times values that is the
token, hence the layout of `channels_kernel`. Divisions are `div_rn`: Triton's `/` is a fast division on a GPU, off by
up to two units in the last place, and codes at a tie would differ from the oracle's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.launch import padded_head_dim
from diffusion_opt.kernels.quantizers.formats import E4M3_MAX as LARGEST_E4M3
from diffusion_opt.kernels.quantizers.formats import INT8_MAX as LARGEST_INT8
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK, ScaleGroups
from diffusion_opt.kernels.quantizers.rounding import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN,
    NVFP4_BLOCK,
    NVFP4_MAX,
    at_least,
    clamped,
    largest,
    nonzero,
    round_e2m1,
    round_int8,
    round_positive_e4m3,
)
from diffusion_opt.kernels.tiles import head_of, load_rows, program_of_head

CHANNELS_ROWS = 64  # tokens a program of channels_kernel converts


@triton.jit
def load_centered(
    X, MEAN, start, num_tokens, strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_L: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """BLOCK_L tokens less the mean, float32, zeros where there is no token or channel."""
    rows = tl.arange(0, BLOCK_L)
    dims = tl.arange(0, PADDED_DIM)
    x = load_rows(X, start, rows, dims, strides, num_tokens, HEAD_DIM, True).to(tl.float32)
    if CENTERED:
        mean = tl.load(MEAN + dims, mask=dims < HEAD_DIM, other=0.0)
        x = tl.where((start + rows < num_tokens)[:, None], x - mean[None, :], 0.0)
    return x


@triton.jit
def group_scales(sizes, TOP: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr):
    """Scales (windows, groups) from the largest number of each token, and the scale of each token."""
    WINDOWS: tl.constexpr = sizes.shape[0] // WINDOW
    REPEATS: tl.constexpr = WINDOW // (GROUPS * RUN)
    sizes = largest(largest(tl.reshape(sizes, (WINDOWS, REPEATS, GROUPS, RUN)), 3), 1)
    scales = nonzero(tl.div_rn(sizes, tl.full(sizes.shape, TOP, tl.float32)))
    by_token = tl.broadcast_to(scales[:, None, :, None], (WINDOWS, REPEATS, GROUPS, RUN))
    return scales, tl.reshape(by_token, (WINDOWS * WINDOW,))


@triton.jit
def to_codes(x, by_token, INT8: tl.constexpr):
    """8-bit codes of a tile whose tokens have these scales."""
    z = tl.div_rn(x, tl.broadcast_to(by_token[:, None], x.shape))
    return round_int8(z) if INT8 else clamped(z, E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def store_scales(SCALES, scales, start, num_scales, WINDOW: tl.constexpr, GROUPS: tl.constexpr):
    """Write the scales (windows, groups) of the tile that starts at this token."""
    COUNT: tl.constexpr = scales.shape[0] * scales.shape[1]
    number = start // WINDOW * GROUPS + tl.arange(0, COUNT)
    tl.store(SCALES + number, tl.reshape(scales, (COUNT,)), mask=number < num_scales)


@triton.jit
def tokens_kernel(
    X, MEAN, CODES, SCALES, num_heads, num_tokens, num_scales, strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, INT8: tl.constexpr, CENTERED: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """8-bit codes (b, h, l, d) and scales (b, h, s) of BLOCK_M tokens of one head."""
    tile, head, b, h = program_of_head(num_tokens, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    X = head_of(X, strides, b, h)
    x = load_centered(X, MEAN + head * HEAD_DIM, start, num_tokens, strides, HEAD_DIM, PADDED_DIM, BLOCK_M, CENTERED)
    scales, by_token = group_scales(largest(tl.abs(x), 1), TOP, WINDOW, GROUPS, RUN)
    store_scales(SCALES + head * num_scales, scales, start, num_scales, WINDOW, GROUPS)
    rows = start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    place = (head * num_tokens + rows)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(CODES + place, to_codes(x, by_token, INT8), mask=(rows < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def channels_kernel(
    X, SCALES, CODES, num_heads, num_tokens, channel_stride, strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """e4m3 codes (b, h, d, l) of BLOCK_M tokens of one head; the channels lie `channel_stride` apart."""
    tile, head, b, h = program_of_head(num_tokens, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    X = head_of(X, strides, b, h)
    x = load_centered(X, SCALES, start, num_tokens, strides, HEAD_DIM, PADDED_DIM, BLOCK_M, False)
    rows = start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    scales = tl.load(SCALES + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=1.0)
    z = tl.div_rn(x, tl.broadcast_to(scales[None, :], x.shape))
    codes = clamped(z, E4M3_MAX).to(tl.float8e4nv)
    place = (head * HEAD_DIM + dims)[None, :] * channel_stride + rows[:, None]
    tl.store(CODES + place, codes, mask=(rows < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def nvfp4_kernel(
    X, MEAN, VALUES, SCALES, num_heads, num_tokens, num_means, strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    ALONG_TOKENS: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """NVFP4 values (b, h, l, d), and the scale (b, h, tiles) of a tile of BLOCK_M tokens of one head."""
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tile, head, b, h = program_of_head(num_tokens, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    X = head_of(X, strides, b, h)
    MEAN += (head * num_means + tile % num_means) * HEAD_DIM
    x = load_centered(X, MEAN, start, num_tokens, strides, HEAD_DIM, PADDED_DIM, BLOCK_M, CENTERED)
    size = largest(largest(tl.abs(x), 1), 0)
    unit = nonzero(tl.div_rn(size, tl.full(size.shape, NVFP4_MAX, tl.float32)))
    tl.store(SCALES + head * num_tiles + tile, unit)
    AXIS: tl.constexpr = 1 if ALONG_TOKENS else 2
    if ALONG_TOKENS:
        blocks = tl.reshape(x, (BLOCK_M // NVFP4_BLOCK, NVFP4_BLOCK, PADDED_DIM))
    else:
        blocks = tl.reshape(x, (BLOCK_M, PADDED_DIM // NVFP4_BLOCK, NVFP4_BLOCK))
    sizes = largest(tl.abs(blocks), AXIS)
    relative = tl.div_rn(sizes, tl.broadcast_to(unit * E2M1_MAX, sizes.shape))
    scales = tl.expand_dims(round_positive_e4m3(at_least(relative, E4M3_MIN)), AXIS)
    codes = round_e2m1(tl.div_rn(blocks, tl.broadcast_to(scales * unit, blocks.shape)))
    values = tl.reshape(codes * scales, (BLOCK_M, PADDED_DIM))
    rows = start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    place = (head * num_tokens + rows)[:, None] * HEAD_DIM + dims[None, :]
    inside = (rows < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(VALUES + place, values.to(VALUES.dtype.element_ty), mask=inside)


def num_warps(padded_dim: int) -> int:
    """Wide heads spread over more threads: a tile is held in registers as a whole."""
    return 4 if padded_dim <= 64 else 8


def shape_constants(head_dim: int) -> dict[str, int]:
    """The constants that all quantizers take, the number of tokens of a tile excepted."""
    return {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim)}


def group_constants(groups: ScaleGroups, int8: bool) -> dict[str, object]:
    """How tokens share scales, and the code that the largest of them gets."""
    top = LARGEST_INT8 if int8 else LARGEST_E4M3
    return {"WINDOW": groups.window, "GROUPS": groups.groups, "RUN": groups.run, "INT8": int8, "TOP": top}


def tokens_block(groups: ScaleGroups) -> int:
    """Tokens of a program of tokens_kernel: whole windows."""
    return max(groups.window, KEY_BLOCK)


def launch_tokens(x: Tensor, mean: Tensor | None, groups: ScaleGroups, codes: Tensor, scales: Tensor) -> None:
    """Fill codes and scales."""
    constants = {**group_constants(groups, codes.dtype == torch.int8), "CENTERED": mean is not None}
    arguments = (x, scales if mean is None else mean, codes, scales, x.shape[1], x.shape[2], scales.shape[2])
    _launch(tokens_kernel, x, tokens_block(groups), *arguments, **constants)


def launch_channels(x: Tensor, scales: Tensor, codes: Tensor) -> None:
    """Fill codes, of which the tokens are neighbors in memory."""
    _launch(channels_kernel, x, CHANNELS_ROWS, x, scales, codes, x.shape[1], x.shape[2], codes.stride(3))


def launch_nvfp4(x: Tensor, mean: Tensor | None, tile: int, along_tokens: bool, values: Tensor, scales: Tensor) -> None:
    """Fill values and scales."""
    num_means = 1 if mean is None else mean.shape[2]
    arguments = (x, scales if mean is None else mean, values, scales, x.shape[1], x.shape[2], num_means)
    _launch(nvfp4_kernel, x, tile, *arguments, ALONG_TOKENS=along_tokens, CENTERED=mean is not None)


def _launch(kernel: Any, x: Tensor, block: int, *arguments: object, **constants: object) -> None:
    b, h, length, d = x.shape
    shape = shape_constants(d)
    constants |= {**shape, "BLOCK_M": block, "num_warps": num_warps(shape["PADDED_DIM"])}
    runtime.run(kernel, (triton.cdiv(length, block) * b * h,), *arguments, x.stride(), **constants)
