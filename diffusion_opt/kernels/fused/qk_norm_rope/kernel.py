"""Norm, rotation and quantization of queries or keys in one Triton kernel: memory is read once and written once.

    norm_rope_kernel       normalize, rotate; write in the type of the output, or as INT8 or FP8 codes with scales
    inverse_rms_kernel     1 / rms over all heads, for models that normalize across them (Wan, LTX-2): a program of the
                           other kernel sees one head

A program holds a tile of tokens of one head as two halves, the first and the second channel of each pair, so the
rotation is four multiplications on whole registers, whichever channels make a pair. Neighbors are loaded and stored as
whole rows and taken apart in registers. Heads come before tokens in the numbering of programs: angles are read once for
all heads.

Keys are smoothed by their mean over all tokens, which is known when the last one is rotated. So each program also
writes the sum of its tokens, before rounding, and the mean comes with the result: for a second pass over the keys, or,
since softmax does not mind which vector is taken off, for the next denoising step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.fused.qk_norm_rope.oracle import Rotation
from diffusion_opt.kernels.launch import padded_head_dim
from diffusion_opt.kernels.quantizers.kernel import (
    group_constants,
    group_scales,
    num_warps,
    store_scales,
    to_codes,
    tokens_block,
)
from diffusion_opt.kernels.quantizers.oracle import ScaleGroups
from diffusion_opt.kernels.quantizers.rounding import at_least, largest
from diffusion_opt.kernels.tiles import head_of, load_rows

FLOAT_BLOCK = 32  # tokens of a program that writes floats
RMS_BLOCK = 32  # tokens of a program of inverse_rms_kernel


@triton.jit
def load_pairs(X, start, rows, strides, end, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """First and second channels (rows, PADDED_DIM / 2) of the pairs of a tile, float32, zeros outside."""
    HALF: tl.constexpr = PADDED_DIM // 2
    if PAIRS == "halves":
        dims = tl.arange(0, HALF)
        first = load_rows(X, start, rows, dims, strides, end, HEAD_DIM // 2, True)
        second = load_rows(X + HEAD_DIM // 2 * strides[3], start, rows, dims, strides, end, HEAD_DIM // 2, True)
    else:
        x = load_rows(X, start, rows, tl.arange(0, PADDED_DIM), strides, end, HEAD_DIM, True)
        first, second = tl.split(tl.reshape(x, (rows.shape[0], HALF, 2)))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_vector_pairs(V, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """First and second channels of a contiguous vector, float32."""
    pair = tl.arange(0, PADDED_DIM // 2)
    STEP: tl.constexpr = 1 if PAIRS == "halves" else 2
    OTHER: tl.constexpr = HEAD_DIM // 2 if PAIRS == "halves" else 1
    first = tl.load(V + pair * STEP, mask=pair < HEAD_DIM // 2, other=0.0)
    second = tl.load(V + pair * STEP + OTHER, mask=pair < HEAD_DIM // 2, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(
    Y, first, second, start, rows, strides, end,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write what `load_pairs` would read; the halves have the type of the memory."""
    address = Y + tl.cast(start, tl.int64) * strides[2] + rows[:, None] * strides[2]
    inside = (start + rows < end)[:, None]
    if PAIRS == "halves":
        dims = tl.arange(0, PADDED_DIM // 2)[None, :]
        tl.store(address + dims * strides[3], first, mask=inside & (dims < HEAD_DIM // 2))
        tl.store(address + (dims + HEAD_DIM // 2) * strides[3], second, mask=inside & (dims < HEAD_DIM // 2))
    else:
        dims = tl.arange(0, PADDED_DIM)[None, :]
        y = tl.reshape(tl.join(first, second), (rows.shape[0], PADDED_DIM))
        tl.store(address + dims * strides[3], y, mask=inside & (dims < HEAD_DIM))


@triton.jit
def inverse_rms_kernel(
    X, INVERSE_RMS, eps, num_heads, num_tokens, x_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """1 / rms (b, l) over all heads of BLOCK_M tokens."""
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    start = tl.program_id(0) % num_tiles * BLOCK_M
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for h in range(0, num_heads):
        head = head_of(X, x_strides, b, tl.cast(h, tl.int64))
        x = load_rows(head, start, rows, dims, x_strides, num_tokens, HEAD_DIM, True).to(tl.float32)
        squares += tl.sum(x * x, 1)
    inverse = tl.rsqrt(squares / (num_heads * HEAD_DIM) + eps)
    tl.store(INVERSE_RMS + b * num_tokens + start + rows, inverse, mask=start + rows < num_tokens)


@triton.jit
def norm_rope_kernel(
    X, WEIGHT, INVERSE_RMS, COS, SIN, MEAN, Y, SCALES, SUMS, eps, num_heads, num_tokens, num_scales,
    x_strides, cos_strides, sin_strides, y_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, ACROSS_HEADS: tl.constexpr,
    PAIRS: tl.constexpr, ROTATE: tl.constexpr, WITH_SUMS: tl.constexpr, QUANTIZE: tl.constexpr,
    CENTERED: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, INT8: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of one head; SCALES (b, h, s), SUMS (b, h, tiles, d) and MEAN (b, h, d) are contiguous."""
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    h = (tl.program_id(0) % num_heads).to(tl.int64)
    tile = tl.program_id(0) // num_heads % num_tiles
    b = (tl.program_id(0) // num_heads // num_tiles).to(tl.int64)
    start = tile * BLOCK_M
    head = b * num_heads + h
    rows, pair = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM // 2)
    X = head_of(X, x_strides, b, h)
    first, second = load_pairs(X, start, rows, x_strides, num_tokens, HEAD_DIM, PADDED_DIM, PAIRS)
    if ACROSS_HEADS:
        WEIGHT += h * HEAD_DIM
        inverse = tl.load(INVERSE_RMS + b * num_tokens + start + rows, mask=start + rows < num_tokens, other=0.0)
    else:
        inverse = tl.rsqrt(tl.sum(first * first + second * second, 1) / HEAD_DIM + eps)
    weight_1, weight_2 = load_vector_pairs(WEIGHT, HEAD_DIM, PADDED_DIM, PAIRS)
    first, second = first * inverse[:, None] * weight_1[None, :], second * inverse[:, None] * weight_2[None, :]
    if ROTATE:
        COS, SIN = head_of(COS, cos_strides, b, h), head_of(SIN, sin_strides, b, h)
        cos = load_rows(COS, start, rows, pair, cos_strides, num_tokens, HEAD_DIM // 2, True).to(tl.float32)
        sin = load_rows(SIN, start, rows, pair, sin_strides, num_tokens, HEAD_DIM // 2, True).to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin
    if WITH_SUMS:
        SUMS += (head * num_tiles + tile) * HEAD_DIM
        sums_1, sums_2 = tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :]
        store_pairs(SUMS, sums_1, sums_2, 0, tl.arange(0, 1), (0, 0, HEAD_DIM, 1), 1, HEAD_DIM, PADDED_DIM, PAIRS)
    if QUANTIZE:
        if CENTERED:
            mean_1, mean_2 = load_vector_pairs(MEAN + head * HEAD_DIM, HEAD_DIM, PADDED_DIM, PAIRS)
            inside = (start + rows < num_tokens)[:, None]
            first = tl.where(inside, first - mean_1[None, :], 0.0)
            second = tl.where(inside, second - mean_2[None, :], 0.0)
        sizes = at_least(largest(tl.abs(first), 1), largest(tl.abs(second), 1))
        scales, by_token = group_scales(sizes, TOP, WINDOW, GROUPS, RUN)
        store_scales(SCALES + head * num_scales, scales, start, num_scales, WINDOW, GROUPS)
        y_1, y_2 = to_codes(first, by_token, INT8), to_codes(second, by_token, INT8)
    else:
        y_1, y_2 = first.to(Y.dtype.element_ty), second.to(Y.dtype.element_ty)
    Y = head_of(Y, y_strides, b, h)
    store_pairs(Y, y_1, y_2, start, rows, y_strides, num_tokens, HEAD_DIM, PADDED_DIM, PAIRS)


NOT_QUANTIZED = {"QUANTIZE": False, "CENTERED": False, "WINDOW": 1, "GROUPS": 1, "RUN": 1, "INT8": False, "TOP": 1.0}


def shape_constants(head_dim: int, across_heads: bool, pairs: str | None) -> dict[str, object]:
    """The constants that follow from the model; without a rotation, how channels are paired does not matter."""
    shape = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim), "ACROSS_HEADS": across_heads}
    return {**shape, "PAIRS": pairs or "halves", "ROTATE": pairs is not None}


def quantized_constants(groups: ScaleGroups, int8: bool, centered: bool) -> dict[str, object]:
    return {"QUANTIZE": True, "CENTERED": centered, **group_constants(groups, int8)}


def launch_norm_rope(
    x: Tensor, weight: Tensor, rotation: Rotation | None, eps: float, y: Tensor, with_mean: bool,
    groups: ScaleGroups | None = None, scales: Tensor | None = None, mean: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill y (and scales, if y are codes); the mean over tokens (b, h, d), empty unless `with_mean`."""
    b, h, length, d = x.shape
    across = len(weight) != d
    inverse = _inverse_rms(x, eps) if across else weight
    block = FLOAT_BLOCK if groups is None else tokens_block(groups)
    own = NOT_QUANTIZED if groups is None else quantized_constants(groups, y.dtype == torch.int8, mean is not None)
    tiles = triton.cdiv(length, block)
    sums = x.new_empty((b, h, tiles, d) if with_mean else (b, h, 0, d), dtype=torch.float32)
    cos, sin = (x, x) if rotation is None else [table.expand(b, h, -1, -1) for table in rotation[:2]]
    shape = shape_constants(d, across, None if rotation is None else rotation.pairs)
    runtime.run(
        norm_rope_kernel,
        (tiles * b * h,),
        *(x, weight, inverse, cos, sin, weight if mean is None else mean.contiguous(), y),
        *(weight if scales is None else scales, sums, eps, h, length, 0 if scales is None else scales.shape[2]),
        *(x.stride(), cos.stride(), sin.stride(), y.stride()),
        **{**shape, **own, "BLOCK_M": block, "WITH_SUMS": with_mean, "num_warps": num_warps(shape["PADDED_DIM"])},
    )
    return sums.sum(2) / length if with_mean else x.new_empty(0, dtype=torch.float32)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    b, h, length, d = x.shape
    inverse = x.new_empty(b, length, dtype=torch.float32)
    constants = {"HEAD_DIM": d, "PADDED_DIM": padded_head_dim(d), "BLOCK_M": RMS_BLOCK}
    grid = (triton.cdiv(length, RMS_BLOCK) * b,)
    warps = num_warps(constants["PADDED_DIM"])
    runtime.run(inverse_rms_kernel, grid, x, inverse, eps, h, length, x.stride(), **constants, num_warps=warps)
    return inverse
