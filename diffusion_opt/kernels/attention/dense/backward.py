"""Dense attention, backward: the weights are computed again from q, k and lse, never stored.

    P = exp(S - lse)                        D = rowsum(dO * O) - dlse
    dV = P^T dO      dS = P * (dO V^T - D)      dQ = sigma dS K      dK = sigma dS^T Q

(Dao et al. 2022, FlashAttention, arXiv 2205.14135, appendix B.) Three kernels, each of which owns what it writes:

    prepare    one pass over dO and O: D, and lse in base 2 with +inf for empty rows, so that 2^(s - lse) is 0 there
    keys       a program owns BLOCK_N keys and walks over the queries: dK, dV; tiles transposed, P^T = 2^(K Q^T - lse)
    queries    a program owns BLOCK_M queries and walks over the keys: dQ

FlashAttention's own kernel computes S once and adds to dQ from many programs with atomics, in an order that changes
from run to run. Computing S twice costs 7 products of matrices instead of 5 and gives the same bits every time, so a
training run can be resumed and tested bit for bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense.forward import (
    CASES,
    dense_case,
    kernel_mask,
    load_rows,
    masked_scores,
    precision,
)
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of

LOG2_E = tl.constexpr(1.4426950408889634)
PREPARED_ROWS = 64  # a pass over memory: the tile hardly matters


@triton.jit
def prepare_kernel(
    OUT, GRAD_OUT, LSE, GRAD_LSE, DELTA, LSE2, num_heads, num_queries,
    stride_ob, stride_oh, stride_ol, stride_od, stride_gb, stride_gh, stride_gl, stride_gd,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D = rowsum(dO * O) - dlse and lse / ln 2 of BLOCK_M queries; all but O and dO are contiguous (b, h, lq)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    start = tl.program_id(0) % num_tiles * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    OUT += b * stride_ob + h * stride_oh
    GRAD_OUT += b * stride_gb + h * stride_gh
    out = load_rows(OUT, start, rows, dims, stride_ol, stride_od, num_queries, HEAD_DIM, True).to(tl.float32)
    grad_out = load_rows(GRAD_OUT, start, rows, dims, stride_gl, stride_gd, num_queries, HEAD_DIM, True).to(tl.float32)
    place = head * num_queries + start + rows
    inside = start + rows < num_queries
    lse = tl.load(LSE + place, mask=inside, other=0.0)
    grad_lse = tl.load(GRAD_LSE + place, mask=inside, other=0.0)
    tl.store(DELTA + place, tl.sum(out * grad_out, 1) - grad_lse, mask=inside)
    tl.store(LSE2 + place, tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E), mask=inside)


@triton.jit
def walk_queries(
    k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, first, last, keys, num_keys,
    stride_ql, stride_qd, stride_gl, stride_gd, stride_mq, stride_mk,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add what queries first to last contribute to the gradients of a tile of keys (dK still without sigma)."""
    dims = tl.arange(0, k.shape[1])
    rows = tl.arange(0, BLOCK_M)
    for start in range(first, last, BLOCK_M):
        q = load_rows(Q, start, rows, dims, stride_ql, stride_qd, last, HEAD_DIM, TAIL)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if KIND != "none":
            inside = (keys < num_keys)[:, None]
            queries = tl.zeros([1], tl.int32) if PER_KEY else start + rows
            if not PER_KEY:
                inside = inside & (start + rows < last)[None, :]
            scores = masked_scores(scores, MASK, keys, queries, stride_mk, stride_mq, inside, KIND)
        if TAIL:
            lse = tl.load(LSE2 + start + rows, mask=start + rows < last, other=float("inf"))
            delta = tl.load(DELTA + start + rows, mask=start + rows < last, other=0.0)
        else:
            lse = tl.load(LSE2 + start + rows)
            delta = tl.load(DELTA + start + rows)
        weights = tl.exp2(scores - lse[None, :])
        grad_out = load_rows(GRAD_OUT, start, rows, dims, stride_gl, stride_gd, last, HEAD_DIM, TAIL)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def keys_kernel(
    Q, K, V, MASK, GRAD_OUT, LSE2, DELTA, GRAD_K, GRAD_V, scale, sigma, num_heads, num_queries, num_keys,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_gb, stride_gh, stride_gl, stride_gd,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV (contiguous (b, h, lk, d)) of BLOCK_N keys of one head; `scale` is sigma log2 e."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    start = tl.program_id(0) % num_tiles * BLOCK_N
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    Q += b * stride_qb + h * stride_qh
    GRAD_OUT += b * stride_gb + h * stride_gh
    MASK += b * stride_mb + h * stride_mh
    LSE2 += head * num_queries
    DELTA += head * num_queries
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, PADDED_DIM)
    k = load_rows(K + b * stride_kb + h * stride_kh, start, keys, dims, stride_kl, stride_kd, num_keys, HEAD_DIM, True)
    v = load_rows(V + b * stride_vb + h * stride_vh, start, keys, dims, stride_vl, stride_vd, num_keys, HEAD_DIM, True)
    grad_k = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    whole = num_queries // BLOCK_M * BLOCK_M
    grad_k, grad_v = walk_queries(
        k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, 0, whole, start + keys, num_keys,
        stride_ql, stride_qd, stride_gl, stride_gd, stride_mq, stride_mk, HEAD_DIM, BLOCK_M, KIND, PER_KEY,
        PRECISION, False,
    )  # fmt: skip
    grad_k, grad_v = walk_queries(
        k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, whole, num_queries, start + keys, num_keys,
        stride_ql, stride_qd, stride_gl, stride_gd, stride_mq, stride_mk, HEAD_DIM, BLOCK_M, KIND, PER_KEY,
        PRECISION, True,
    )  # fmt: skip
    place = (head * num_keys + start + keys)[:, None] * HEAD_DIM + dims[None, :]
    inside = (start + keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(GRAD_K + place, (grad_k * sigma).to(GRAD_K.dtype.element_ty), mask=inside)
    tl.store(GRAD_V + place, grad_v.to(GRAD_V.dtype.element_ty), mask=inside)


@triton.jit
def walk_keys_again(
    q, grad_out, lse, delta, grad_q, K, V, MASK, scale, first, last, queries, num_queries,
    stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add what keys first to last contribute to the gradient of a tile of queries (still without sigma)."""
    dims = tl.arange(0, q.shape[1])
    keys = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        k = load_rows(K, start, keys, dims, stride_kl, stride_kd, last, HEAD_DIM, TAIL)
        v = load_rows(V, start, keys, dims, stride_vl, stride_vd, last, HEAD_DIM, TAIL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if KIND != "none":
            inside = (start + keys < last)[None, :]
            rows = tl.zeros([1], tl.int32) if PER_KEY else queries
            if not PER_KEY:
                inside = inside & (queries < num_queries)[:, None]
            scores = masked_scores(scores, MASK, rows, start + keys, stride_mq, stride_mk, inside, KIND)
        elif TAIL:
            scores = tl.where((start + keys < last)[None, :], scores, -float("inf"))
        weights = tl.exp2(scores - lse[:, None])
        grad_scores = weights * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def queries_kernel(
    Q, K, V, MASK, GRAD_OUT, LSE2, DELTA, GRAD_Q, scale, sigma, num_heads, num_queries, num_keys,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_gb, stride_gh, stride_gl, stride_gd,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous (b, h, lq, d)) of BLOCK_M queries of one head; `scale` is sigma log2 e."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    start = tl.program_id(0) % num_tiles * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    MASK += b * stride_mb + h * stride_mh
    Q += b * stride_qb + h * stride_qh
    GRAD_OUT += b * stride_gb + h * stride_gh
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(Q, start, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, True)
    grad_out = load_rows(GRAD_OUT, start, rows, dims, stride_gl, stride_gd, num_queries, HEAD_DIM, True)
    lse = tl.load(LSE2 + head * num_queries + start + rows, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + head * num_queries + start + rows, mask=inside, other=0.0)
    grad_q = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    grad_q = walk_keys_again(
        q, grad_out, lse, delta, grad_q, K, V, MASK, scale, 0, whole, start + rows, num_queries,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk, HEAD_DIM, BLOCK_N, KIND, PER_KEY,
        PRECISION, False,
    )  # fmt: skip
    grad_q = walk_keys_again(
        q, grad_out, lse, delta, grad_q, K, V, MASK, scale, whole, num_keys, start + rows, num_queries,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk, HEAD_DIM, BLOCK_N, KIND, PER_KEY,
        PRECISION, True,
    )  # fmt: skip
    place = (head * num_queries + start + rows)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(
        GRAD_Q + place, (grad_q * sigma).to(GRAD_Q.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :]
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels: gradients of q, k and v, contiguous, in their types."""
    b, h, lq, d = q.shape
    lk = k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    arch = runtime.architecture(q.device)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    shape = {"HEAD_DIM": d, "PADDED_DIM": padded_head_dim(d)}
    runtime.run(
        prepare_kernel,
        (triton.cdiv(lq, PREPARED_ROWS) * b * h,),
        *(out, grad_out, lse, grad_lse.contiguous(), delta, lse2, h, lq, *out.stride(), *grad_out.stride()),
        **shape,
        BLOCK_M=PREPARED_ROWS,
    )
    kind, mask, mask_strides = kernel_mask(mask, q)
    inputs = (q, k, v, mask, grad_out, lse2, delta)
    numbers = (scale / math.log(2), scale, h, lq, lk)
    strides = (*q.stride(), *k.stride(), *v.stride(), *mask_strides, *grad_out.stride())
    for name, kernel, results in (("keys", keys_kernel, grads[1:]), ("queries", queries_kernel, grads[:1])):
        choice = launch(row_of(f"dense_{name}", q.dtype, kind != "none"), arch, d)
        num_tiles = triton.cdiv(lk, choice.block_n) if name == "keys" else triton.cdiv(lq, choice.block_m)
        runtime.run(
            kernel,
            (num_tiles * b * h,),
            *(*inputs, *results, *numbers, *strides),
            **shape,
            BLOCK_M=choice.block_m,
            BLOCK_N=choice.block_n,
            KIND=kind,
            PER_KEY=mask_strides[2] == 0,
            PRECISION=precision(q.dtype),
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
        )
    return grads


def compile_cases() -> tuple[CompileCase, ...]:
    """The two kernels with products of matrices for the ahead-of-time gate."""
    kernels = (("dense_keys", keys_kernel, 8), ("dense_queries", queries_kernel, 6))
    cases = [case for case in CASES if case[0] != torch.float16 and case[2] != "bias per key"]  # forward shows these
    return tuple(dense_case(name, kernel, *case, flops) for name, kernel, flops in kernels for case in cases)
