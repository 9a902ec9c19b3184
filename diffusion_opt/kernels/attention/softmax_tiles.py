"""The pieces that the block-sparse and the region kernel share: one turn of the running softmax, and its end.

Triton functions that kernels call. With the key tiles of a list instead of a range, these are the steps of
`dense/forward.py`: for each query the largest score so far (`peak`, base 2), the sum of weights (`norm`) and the sum of
weighted values (`total`), in float32. Two things differ. A tile can have fewer real keys than places, because it is a
tile of tokens at the border of a grid; `num_keys` says how many. And a tile can have none at all, before any other has
been seen, so that the peak is still -inf; weights are then exp(-inf - 0) = 0 and not NaN. Places without a key are
never read: a weight of 0 times a NaN in such a place would be NaN.

`fitted` makes a choice of the launch table serve masks with smaller blocks.
"""

from math import gcd

import triton
import triton.language as tl

from diffusion_opt.kernels.attention.dense.forward import LN_2
from diffusion_opt.kernels.attention.sparse.packing import LANES
from diffusion_opt.kernels.launch import LaunchConfig


@triton.jit
def real_keys(LENGTHS, block, end, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """How many keys of a block exist: as many as are listed, and none behind the end of the sequence."""
    number = end - block * BLOCK_N
    if HAS_LENGTHS:
        number = tl.minimum(number, tl.load(LENGTHS + block))
    return number


@triton.jit
def softmax_step(
    q, k, v, peak, norm, total, num_keys, scale, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr
):
    """peak, norm and total after a tile, of which the first `num_keys` keys exist if TAIL, else all."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL:
        scores = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)  # scale > 0, so the largest stays the largest
    origin = new_peak
    if TAIL:
        origin = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - origin[:, None])
    correction = tl.exp2(peak - origin)
    total = tl.dot(weights.to(v.dtype), v, total * correction[:, None], input_precision=PRECISION)
    return new_peak, norm * correction + tl.sum(weights, 1), total


@triton.jit
def finish_softmax(peak, norm, total):
    """Output and natural-log LSE: 0 and -inf for queries that saw no key."""
    return total / tl.where(norm == 0.0, 1.0, norm)[:, None], (peak + tl.log2(norm)) * LN_2


@triton.jit
def softmax_again(q, k, lse, num_keys, scale, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr):
    """The weights of a tile once more, from the base-2 LSE; that of a query that does not exist is +inf."""
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if TAIL:
        weights = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], weights, 0.0)
    return weights


@triton.jit
def store_rows(base, start, rows, dims, stride_row, stride_dim, end, tile, HEAD_DIM: tl.constexpr):
    """Write a tile to rows start + rows of a matrix, where they exist, in the type of its memory."""
    address = base + tl.cast(start, tl.int64) * stride_row + rows[:, None] * stride_row + dims[None, :] * stride_dim
    tl.store(address, tile.to(base.dtype.element_ty), mask=(start + rows < end)[:, None] & (dims < HEAD_DIM)[None, :])


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
