"""The running softmax, which all attentions of this room share, and the masks on its scores.

Triton functions that kernels call. A program keeps, for each of its queries, the largest score so far (`peak`, base 2),
the sum of weights (`norm`) and the sum of weighted values (`total`), in float32. A tile of scores changes them so:

    peak' = max(peak, max_j s_j),     p_j = 2^(s_j - peak'),     c = 2^(peak - peak')
    norm' = c norm + sum_j p_j,       total' = c total + sum_j p_j v_j

`softmax_turn` is the first line and norm; what multiplies weights with values differs and stays with each kernel. The
scores come as matrix products still to be multiplied by a positive `factor` (one number, or one for each query): the
largest product is the largest score, so the multiplication joins the subtraction in one instruction per score.

Nothing may be open yet when a tile has been seen: the peak is then -inf, and -inf - (-inf) would be NaN. Where that can
happen (`EMPTY`), weights are taken relative to 0 and are 0. Tiles of tokens at the border of a grid have fewer real
keys than places (`real_keys`); places without a key are never read, because a weight of 0 times a NaN in such a place
would be NaN. `fitted` makes a choice of the launch table serve masks with smaller blocks.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import CLOSED_BELOW
from diffusion_opt.kernels.attention.sparse.packing import LANES
from diffusion_opt.kernels.launch import LaunchConfig
from diffusion_opt.kernels.tiles import LN_2, LOG2_E

CLOSED = tl.constexpr(CLOSED_BELOW)
HALF_MIN = tl.constexpr(torch.finfo(torch.float16).min)


@triton.jit
def start_softmax(BLOCK_M: tl.constexpr, PADDED_DIM: tl.constexpr):
    """peak, norm and total before any key was seen."""
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    return peak, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)


@triton.jit
def softmax_turn(
    scores, factor, peak, norm, BY_ROW: tl.constexpr, EMPTY: tl.constexpr, HEADROOM: tl.constexpr = 0.0
):  # fmt: skip
    """Weights of a tile and what the total is corrected with; peak and norm after it.

    `factor` > 0 is one number, or one for each query (BY_ROW). Weights are 2^HEADROOM times too large, and so is norm.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    origin = tl.where(new_peak == -float("inf"), 0.0, new_peak) if EMPTY else new_peak
    scaled = scores * factor[:, None] if BY_ROW else scores * factor
    weights = tl.exp2(scaled - (origin - HEADROOM)[:, None])
    correction = tl.exp2(peak - origin)
    return weights, correction, new_peak, norm * correction + tl.sum(weights, 1)


@triton.jit
def finish_softmax(peak, norm, total):
    """Output and natural-log LSE: 0 and -inf for queries that saw no key."""
    return total / tl.where(norm == 0.0, 1.0, norm)[:, None], (peak + tl.log2(norm)) * LN_2


@triton.jit
def masked_scores(scores, MASK, rows, columns, stride_row, stride_column, inside, KIND: tl.constexpr):
    """Scores in base 2 with the mask's tile applied: -inf where it is closed or where `inside` is false."""
    address = MASK + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    if KIND == "bool":
        is_open = tl.load(address, mask=inside, other=0) != 0
        result = tl.where(is_open, scores, -float("inf"))
    else:
        bias = tl.load(address, mask=inside, other=-float("inf")).to(tl.float32)
        LEAST: tl.constexpr = HALF_MIN if MASK.dtype.element_ty == tl.float16 else CLOSED
        result = tl.where(bias <= LEAST, -float("inf"), scores + bias * LOG2_E)
    return result


@triton.jit
def real_keys(LENGTHS, block, end, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """How many keys of a block exist: as many as are listed, and none behind the end of the sequence."""
    number = end - block * BLOCK_N
    if HAS_LENGTHS:
        number = tl.minimum(number, tl.load(LENGTHS + block))
    return number


@triton.jit
def listed_turn(
    q, k, v, peak, norm, total, num_keys, scale, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr
):
    """peak, norm and total after a tile, of which the first `num_keys` keys exist if TAIL, else all."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL:
        scores = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], scores, -float("inf"))
    weights, correction, peak, norm = softmax_turn(scores, scale, peak, norm, False, TAIL)
    total = tl.dot(weights.to(v.dtype), v, total * correction[:, None], input_precision=PRECISION)
    return peak, norm, total


@triton.jit
def softmax_again(q, k, lse, num_keys, scale, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr):
    """The weights of a tile once more, from the base-2 LSE; that of a query that does not exist is +inf."""
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if TAIL:
        weights = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], weights, 0.0)
    return weights


def kernel_mask(mask: Tensor | None, q: Tensor) -> tuple[str, Tensor, tuple[int, int, int, int]]:
    """Kind, tensor and strides of a mask expanded to (b, h, lq, lk); booleans as bytes; `q` stands in for none."""
    if mask is None:
        return "none", q, (0, 0, 0, 0)
    if mask.dtype == torch.bool:
        return "bool", mask.view(torch.uint8), mask.stride()
    return "bias", mask, mask.stride()


def fitted(choice: LaunchConfig, block_m: int, block_n: int, owns_keys: bool = False) -> LaunchConfig:
    """The launch table's choice cut to tiles that divide blocks of `block_m` x `block_n`.

    With fewer rows of what a program owns, queries or keys, come fewer warps: four share an instruction of 64 rows.
    Raises ValueError if that leaves less than the 16 x 16 of matrix units.
    """
    tile_m, tile_n = gcd(choice.block_m, block_m), gcd(choice.block_n, block_n)
    if min(tile_m, tile_n) < LANES:
        raise ValueError(
            f"a mask with blocks of {block_m} x {block_n} cannot be cut into tiles for matrix units: its block sizes "
            f"must be multiples of {LANES}"
        )
    share = tile_n / choice.block_n if owns_keys else tile_m / choice.block_m
    return LaunchConfig(tile_m, tile_n, min(choice.num_warps, max(4, int(choice.num_warps * share))), choice.num_stages)
