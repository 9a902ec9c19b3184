"""Attention with 8-bit scores, one Triton kernel for INT8 and FP8: `oracle.py`, tile for tile.

Queries and keys arrive as codes with scales. A score in base 2 is its integer (or e4m3) dot product times one number
for the row, so nothing is multiplied that a row does not share, and the exponential is one multiply-add a score as in
dense attention:

    factor_i = scale log2(e) s_q,i s_k,    peak' = max(peak, factor_i max_j D_ij),    p_ij = 2^(factor_i D_ij - peak')

Scales for groups of keys inside a tile ("thread") cost one multiplication a score more. Weights times values is done in

    fp16        p in float16, v in float16, sums in float32, in place
    fp16_fast   a tile's sums in float16, added in float32
    fp8         448 p in e4m3, v in e4m3; a tile's sums stay in the matrix unit (at 22 bits on sm_90), added in float32

The 448 is inside the exponent (2^(x + log2 448)) and falls out of total / norm, so it costs nothing. On sm_90 Triton
multiplies e4m3 on the 8-bit units only where imprecise sums over some length are allowed: without
`max_num_imprecise_acc` it silently takes the float16 units, at half the speed. The compile gate looks for QGMMA.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.softmax_tiles import (
    finish_softmax,
    kernel_mask,
    masked_scores,
    softmax_turn,
    start_softmax,
)
from diffusion_opt.kernels.launch import launch, padded_head_dim
from diffusion_opt.kernels.quantizers.formats import E4M3_MAX
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS
from diffusion_opt.kernels.tiles import LN_2, LOG2_E, head_of, load_rows, program_of_head, store_rows

LOG2_TOP = tl.constexpr(math.log2(E4M3_MAX))
SMALLEST_DIM = 32  # the matrix units sum over 32 bytes at a time


@triton.jit
def scale_number(tokens, WINDOW: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr):
    """The number of the scale of each token (`ScaleGroups.index`)."""
    return tokens // WINDOW * GROUPS + tokens % (GROUPS * RUN) // RUN


@triton.jit
def add_values(weights, v, total, correction, VALUES_IN: tl.constexpr):
    """Correct the total and add a tile's weights times values."""
    if VALUES_IN == "fp16":
        total = tl.dot(weights.to(tl.float16), v, total * correction[:, None])
    elif VALUES_IN == "fp16_fast":
        total = total * correction[:, None] + tl.dot(weights.to(tl.float16), v, out_dtype=tl.float16).to(tl.float32)
    else:
        part = tl.dot(weights.to(tl.float8e4nv), v, max_num_imprecise_acc=weights.shape[1])
        total = total * correction[:, None] + part
    return total


@triton.jit
def attend_codes(
    q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, start, last, queries, num_queries,
    k_strides, v_strides, mask_strides,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, VALUES_IN: tl.constexpr, UNIFORM: tl.constexpr,
    WINDOW: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """peak, norm and total after the keys from `start` on; norm and total are 448 times too large for fp8."""
    dims, keys = tl.arange(0, q.shape[1]), tl.arange(0, BLOCK_N)
    HEADROOM: tl.constexpr = LOG2_TOP if VALUES_IN == "fp8" else 0.0
    k = load_rows(K, start, keys, dims, k_strides, last, HEAD_DIM, TAIL)
    if q.dtype == tl.int8:
        products = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    else:
        products = tl.dot(q, tl.trans(k), max_num_imprecise_acc=q.shape[1])
    if UNIFORM:
        factor = q_scale * tl.load(K_SCALES + start // WINDOW)
    else:
        number = scale_number(start + keys, WINDOW, GROUPS, RUN)
        products *= tl.load(K_SCALES + number, mask=start + keys < last, other=1.0)[None, :]
        factor = q_scale
    if KIND == "none" and not TAIL:
        weights, correction, peak, norm = softmax_turn(products, factor, peak, norm, True, False, HEADROOM)
    else:
        inside = (queries < num_queries)[:, None] & (start + keys < last)[None, :]
        scores = products * factor[:, None]  # closed only now: a factor may be 0, and 0 times -inf is NaN
        if KIND == "none":
            scores = tl.where(inside, scores, -float("inf"))
        else:
            scores = masked_scores(
                scores, MASK, queries, start + keys, mask_strides[2], mask_strides[3], inside, KIND
            )  # fmt: skip
        weights, correction, peak, norm = softmax_turn(scores, 1.0, peak, norm, False, True, HEADROOM)
    v = load_rows(V, start, keys, dims, v_strides, last, HEAD_DIM, TAIL)
    return peak, norm, add_values(weights, v, total, correction, VALUES_IN)


@triton.jit
def eight_bit_kernel(
    Q, Q_SCALES, K, K_SCALES, V, V_SCALES, MASK, OUT, LSE, scale, num_heads, num_queries, num_keys,
    num_q_scales, num_k_scales, q_strides, k_strides, v_strides, mask_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, VALUES_IN: tl.constexpr,
    Q_WINDOW: tl.constexpr, Q_GROUPS: tl.constexpr, Q_RUN: tl.constexpr,
    K_WINDOW: tl.constexpr, K_GROUPS: tl.constexpr, K_RUN: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries of one head; LSE is contiguous (b, h, lq)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K, V, MASK = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h), head_of(MASK, mask_strides, b, h)
    K_SCALES += head * num_k_scales
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(head_of(Q, q_strides, b, h), start, rows, dims, q_strides, num_queries, HEAD_DIM, True)
    number = head * num_q_scales + scale_number(start + rows, Q_WINDOW, Q_GROUPS, Q_RUN)
    q_scale = tl.load(Q_SCALES + number, mask=inside, other=1.0) * (scale * LOG2_E)
    peak, norm, total = start_softmax(BLOCK_M, PADDED_DIM)
    whole = 0 if FORM == "inside" else num_keys // BLOCK_N * BLOCK_N
    UNIFORM: tl.constexpr = K_GROUPS == 1 and K_WINDOW % BLOCK_N == 0  # one scale for all keys of a tile
    for first in range(0, whole, BLOCK_N):
        peak, norm, total = attend_codes(
            q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, first, whole, start + rows, num_queries,
            k_strides, v_strides, mask_strides,
            HEAD_DIM, BLOCK_N, KIND, VALUES_IN, UNIFORM, K_WINDOW, K_GROUPS, K_RUN, False,
        )  # fmt: skip
    if FORM == "peeled":
        if whole < num_keys:
            peak, norm, total = attend_codes(
                q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, whole, num_keys, start + rows, num_queries,
                k_strides, v_strides, mask_strides,
                HEAD_DIM, BLOCK_N, KIND, VALUES_IN, UNIFORM, K_WINDOW, K_GROUPS, K_RUN, True,
            )  # fmt: skip
    else:
        for first in range(whole, num_keys, BLOCK_N):
            peak, norm, total = attend_codes(
                q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, first, num_keys, start + rows, num_queries,
                k_strides, v_strides, mask_strides,
                HEAD_DIM, BLOCK_N, KIND, VALUES_IN, UNIFORM, K_WINDOW, K_GROUPS, K_RUN, True,
            )  # fmt: skip
    HEADROOM: tl.constexpr = LOG2_TOP if VALUES_IN == "fp8" else 0.0
    out, lse = finish_softmax(peak, norm, total)
    tl.store(LSE + head * num_queries + start + rows, lse - HEADROOM * LN_2, mask=inside)
    out *= tl.load(V_SCALES + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=1.0)[None, :]
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)


def row_of(codes: torch.dtype, values_in: str, kind: str) -> str:
    """The launch table's name of the kernel for these types: tiles of a mask take registers, so masks have own rows."""
    scores, values = "int8" if codes == torch.int8 else "fp8", "fp8" if values_in == "fp8" else "fp16"
    return f"{scores}_scores_{values}_values{'' if kind == 'none' else '_masked'}"


def constants(head_dim: int, granularity: str, values_in: str, kind: str) -> dict[str, object]:
    """The constexpr arguments other than the tiles."""
    queries, keys = QUERY_GROUPS[granularity], KEY_GROUPS[granularity]
    sharing = {"Q_WINDOW": queries.window, "Q_GROUPS": queries.groups, "Q_RUN": queries.run}
    sharing |= {"K_WINDOW": keys.window, "K_GROUPS": keys.groups, "K_RUN": keys.run}
    padded = max(padded_head_dim(head_dim), SMALLEST_DIM)
    return {"HEAD_DIM": head_dim, "PADDED_DIM": padded, "KIND": kind, "VALUES_IN": values_in, **sharing}


def forward(
    q: Tensor, q_scales: Tensor, k: Tensor, k_scales: Tensor, v: Tensor, v_scales: Tensor, mask: Tensor | None,
    scale: float, granularity: str, values_in: str, out: Tensor,
) -> Tensor:  # fmt: skip
    """Launch the kernel: fill `out`, and return the lse (b, h, lq) in float32."""
    b, h, lq, d = q.shape
    lse = torch.empty(b, h, lq, dtype=torch.float32, device=q.device)
    kind, mask, mask_strides = kernel_mask(mask, q)
    choice = launch(row_of(q.dtype, values_in, kind), runtime.architecture(q.device), d)
    runtime.run(
        eight_bit_kernel,
        (triton.cdiv(lq, choice.block_m) * b * h,),
        *(q, q_scales, k, k_scales, v, v_scales, mask, out, lse),
        *(scale, h, lq, k.shape[2], q_scales.shape[2], k_scales.shape[2]),
        *(q.stride(), k.stride(), v.stride(), mask_strides, out.stride()),
        **constants(d, granularity, values_in, kind),
        FORM=choice.form,
        **choice.tuning(),
    )
    return lse
