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
from diffusion_opt.kernels.attention.dense.forward import kernel_mask, load_rows, masked_scores
from diffusion_opt.kernels.gate.case import CompileCase, sampled
from diffusion_opt.kernels.launch import chosen, launch, padded_head_dim
from diffusion_opt.kernels.quantizers.formats import E4M3_MAX
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
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
def walk_codes(
    q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, first, last, queries, num_queries,
    stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, VALUES_IN: tl.constexpr, UNIFORM: tl.constexpr,
    WINDOW: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take keys first to last into the running peak, norm and total; norm and total are 448 times too large for fp8."""
    dims = tl.arange(0, q.shape[1])
    keys = tl.arange(0, BLOCK_N)
    HEADROOM: tl.constexpr = LOG2_TOP if VALUES_IN == "fp8" else 0.0
    for start in range(first, last, BLOCK_N):
        k = load_rows(K, start, keys, dims, stride_kl, stride_kd, last, HEAD_DIM, TAIL)
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
            new_peak = tl.maximum(peak, tl.max(products, 1) * factor)  # factor > 0, so the largest stays the largest
            weights = tl.exp2(products * factor[:, None] - (new_peak - HEADROOM)[:, None])
            correction = tl.exp2(peak - new_peak)
        else:
            inside = (queries < num_queries)[:, None] & (start + keys < last)[None, :]
            scores = products * factor[:, None]  # closed only now: a factor may be 0, and 0 times -inf is NaN
            if KIND == "none":
                scores = tl.where(inside, scores, -float("inf"))
            else:
                scores = masked_scores(scores, MASK, queries, start + keys, stride_mq, stride_mk, inside, KIND)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            origin = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing open so far: all weights are 0
            weights = tl.exp2(scores - (origin - HEADROOM)[:, None])
            correction = tl.exp2(peak - origin)
        norm = norm * correction + tl.sum(weights, 1)
        v = load_rows(V, start, keys, dims, stride_vl, stride_vd, last, HEAD_DIM, TAIL)
        total = add_values(weights, v, total, correction, VALUES_IN)
        peak = new_peak
    return peak, norm, total


@triton.jit
def eight_bit_kernel(
    Q, Q_SCALES, K, K_SCALES, V, V_SCALES, MASK, OUT, LSE, scale, num_heads, num_queries, num_keys,
    num_q_scales, num_k_scales, stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ob, stride_oh, stride_ol, stride_od,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, VALUES_IN: tl.constexpr,
    Q_WINDOW: tl.constexpr, Q_GROUPS: tl.constexpr, Q_RUN: tl.constexpr,
    K_WINDOW: tl.constexpr, K_GROUPS: tl.constexpr, K_RUN: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries of one head; LSE is contiguous (b, h, lq)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    start = tl.program_id(0) % num_tiles * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    MASK += b * stride_mb + h * stride_mh
    K_SCALES += head * num_k_scales
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(
        Q + b * stride_qb + h * stride_qh, start, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, True
    )
    number = head * num_q_scales + scale_number(start + rows, Q_WINDOW, Q_GROUPS, Q_RUN)
    q_scale = tl.load(Q_SCALES + number, mask=inside, other=1.0) * (scale * LOG2_E)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    UNIFORM: tl.constexpr = K_GROUPS == 1 and K_WINDOW % BLOCK_N == 0  # one scale for all keys of a tile
    peak, norm, total = walk_codes(
        q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, 0, whole, start + rows, num_queries,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk,
        HEAD_DIM, BLOCK_N, KIND, VALUES_IN, UNIFORM, K_WINDOW, K_GROUPS, K_RUN, False,
    )  # fmt: skip
    peak, norm, total = walk_codes(
        q, q_scale, peak, norm, total, K, K_SCALES, V, MASK, whole, num_keys, start + rows, num_queries,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk,
        HEAD_DIM, BLOCK_N, KIND, VALUES_IN, UNIFORM, K_WINDOW, K_GROUPS, K_RUN, True,
    )  # fmt: skip
    HEADROOM: tl.constexpr = LOG2_TOP if VALUES_IN == "fp8" else 0.0
    tl.store(LSE + head * num_queries + start + rows, (peak + tl.log2(norm) - HEADROOM) * LN_2, mask=inside)
    out = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    out *= tl.load(V_SCALES + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=1.0)[None, :]
    address = OUT + b * stride_ob + h * stride_oh + tl.cast(start, tl.int64) * stride_ol
    address += rows[:, None] * stride_ol + dims[None, :] * stride_od
    tl.store(address, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :])


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
        *(*q.stride(), *k.stride(), *v.stride(), *mask_strides, *out.stride()),
        **constants(d, granularity, values_in, kind),
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return lse


INTEGER_UNITS = {80: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA",), 100: ("IMMA",), 120: ("IMMA",)}
HALF_UNITS = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)}
FP8_UNITS = {89: ("QMMA",), 90: ("QGMMA",), 100: ("UTCQMMA",), 120: ("QMMA",)}
CASES = (  # what the ahead-of-time gate compiles: (codes, head dimension, granularity, values in, mask)
    (torch.int8, 64, "block", "fp16", "none"),
    (torch.int8, 128, "block", "fp16", "none"),
    (torch.int8, 128, "block", "fp16", "bias"),
    (torch.int8, 128, "thread", "fp16_fast", "none"),
    (torch.int8, 64, "thread", "fp8", "none"),
    (torch.int8, 128, "thread", "fp8", "none"),
    (torch.int8, 128, "thread", "fp8", "bool"),
    (torch.float8_e4m3fn, 64, "block", "fp8", "none"),
    (torch.float8_e4m3fn, 128, "block", "fp8", "none"),
    (torch.float8_e4m3fn, 128, "block", "fp8", "bool"),
)


def signature(codes: torch.dtype, values_in: str, kind: str) -> dict[str, str]:
    """The types of the kernel's arguments in a launch on contiguous codes."""
    pointer = "*i8" if codes == torch.int8 else "*fp8e4nv"
    mask = {"none": pointer, "bool": "*u8", "bias": "*fp32"}[kind]
    types = {
        "Q": pointer,
        "K": pointer,
        "V": "*fp8e4nv" if values_in == "fp8" else "*fp16",
        "OUT": "*bf16",
        "MASK": mask,
    }
    types |= dict.fromkeys(("Q_SCALES", "K_SCALES", "V_SCALES", "LSE"), "*fp32") | {"scale": "fp32"}
    ones = ["stride_qd", "stride_kd", "stride_vl" if values_in == "fp8" else "stride_vd", "stride_od"]
    ones += [] if kind == "none" else ["stride_mk"]
    types |= dict.fromkeys([*constants(64, "block", values_in, kind), "BLOCK_M", "BLOCK_N", *ones], "constexpr")
    return {name: types.get(name, "i32") for name in eight_bit_kernel.arg_names}


def compile_case(codes: torch.dtype, head_dim: int, granularity: str, values_in: str, kind: str) -> CompileCase:
    types = signature(codes, values_in, kind)
    given = constants(head_dim, granularity, values_in, kind)
    ones = [name for name, type_ in types.items() if type_ == "constexpr" and name.startswith("stride")]
    uneven = ("num_heads", "num_q_scales", "num_k_scales")
    aligned = [name for name, type_ in types.items() if type_[0] == "*" or (type_ == "i32" and name not in uneven)]
    everywhere = (head_dim, kind) == (128, "none") and values_in != "fp16_fast"
    row = sampled(chosen(row_of(codes, values_in, kind), head_dim), everywhere)
    first, second = INTEGER_UNITS if codes == torch.int8 else FP8_UNITS, FP8_UNITS if values_in == "fp8" else HALF_UNITS
    scores = "int8" if codes == torch.int8 else "fp8"
    values = "fp8" if values_in == "fp8" else "fp16"
    flops = {scores: 4 * head_dim} if scores == values else {scores: 2 * head_dim, values: 2 * head_dim}
    mask = "" if kind == "none" else f" {kind} mask"
    return CompileCase(
        name=f"{scores} scores {values_in} values {granularity} d{head_dim}{mask}",
        kernel=eight_bit_kernel,
        signature=types,
        constexprs={**given, **dict.fromkeys(ones, 1)},
        divisible=tuple(aligned),
        launch=row,
        opcodes={arch: tuple(dict.fromkeys((*first[arch], *second[arch]))) for arch in row},
        loop_flops=flops,
        loop_exps=1,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The kernel in each precision for the ahead-of-time gate."""
    return tuple(compile_case(*case) for case in CASES)
