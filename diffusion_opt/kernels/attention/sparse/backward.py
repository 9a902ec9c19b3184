"""The gradient of attention over listed tiles: q by the lists, k and v by the transposed lists.

With the weights p = exp(s - lse) computed again tile by tile and delta_i = do_i . out_i - dlse_i,

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i),   dq_i = sigma sum_j ds_ij k_j,
                                                                     dk_j = sigma sum_i ds_ij q_i

(Dao 2023, arXiv 2307.08691, algorithm 2). A program of the first kernel owns a block of queries and walks its list of
key blocks; one of the second owns a block of keys and walks the list of the query blocks that attend to it. Both read
what they need and write what they own, so there are no atomics and the bits do not depend on scheduling. The price is
that scores are computed twice.

FastVideo's Triton backward for VSA walks lists too, for blocks of 64 x 64 in bfloat16.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense.backward import PREPARED_ROWS, prepare_kernel
from diffusion_opt.kernels.attention.dense.forward import load_rows, precision
from diffusion_opt.kernels.attention.softmax_tiles import fitted, real_keys, softmax_again, store_rows
from diffusion_opt.kernels.attention.sparse.forward import CASES, sparse_case
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of


@triton.jit
def sparse_queries_kernel(
    Q, K, V, GRAD_OUT, LSE2, DELTA, GRAD_Q, INDICES, COUNTS, LENGTHS,
    scale, sigma, num_heads, num_queries, num_keys, list_b, list_h, most,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_gb, stride_gh, stride_gl, stride_gd,
    stride_ob, stride_oh, stride_ol, stride_od,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, QUERY_TAIL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries; `scale` is sigma log2 e, LSE2 the lse in base 2."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    start = tile * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    GRAD_OUT += b * stride_gb + h * stride_gh
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(Q, start, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, QUERY_TAIL)
    grad_out = load_rows(GRAD_OUT, start, rows, dims, stride_gl, stride_gd, num_queries, HEAD_DIM, QUERY_TAIL)
    lse = tl.load(LSE2 + head * num_queries + start + rows, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + head * num_queries + start + rows, mask=inside, other=0.0)
    grad_q = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row = b * list_b + h * list_h + tile
    for i in range(tl.load(COUNTS + row)):
        block = tl.load(INDICES + row * most + i)
        first = block * BLOCK_N
        real = real_keys(LENGTHS, block, num_keys, BLOCK_N, HAS_LENGTHS)
        k = load_rows(K, first, keys, dims, stride_kl, stride_kd, first + real, HEAD_DIM, TAIL)
        v = load_rows(V, first, keys, dims, stride_vl, stride_vd, first + real, HEAD_DIM, TAIL)
        weights = softmax_again(q, k, lse, real, scale, BLOCK_N, PRECISION, TAIL)
        grad_scores = weights * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    GRAD_Q += b * stride_ob + h * stride_oh
    store_rows(GRAD_Q, start, rows, dims, stride_ol, stride_od, num_queries, grad_q * sigma, HEAD_DIM)


@triton.jit
def sparse_keys_kernel(
    Q, K, V, GRAD_OUT, LSE2, DELTA, GRAD_K, GRAD_V, INDICES, COUNTS, LENGTHS,
    scale, sigma, num_heads, num_queries, num_keys, list_b, list_h, most,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_gb, stride_gh, stride_gl, stride_gd,
    stride_ob, stride_oh, stride_ol, stride_od, stride_pb, stride_ph, stride_pl, stride_pd,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, QUERY_TAIL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, by the transposed lists; tiles are transposed too: weights stay in registers."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    tile = tl.program_id(0) % num_tiles
    start = tile * BLOCK_N
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    GRAD_OUT += b * stride_gb + h * stride_gh
    LSE2 += head * num_queries
    DELTA += head * num_queries
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    real = real_keys(LENGTHS, tile, num_keys, BLOCK_N, HAS_LENGTHS)
    k = load_rows(K, start, keys, dims, stride_kl, stride_kd, start + real, HEAD_DIM, TAIL)
    v = load_rows(V, start, keys, dims, stride_vl, stride_vd, start + real, HEAD_DIM, TAIL)
    grad_k = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    row = b * list_b + h * list_h + tile
    for i in range(tl.load(COUNTS + row)):
        first = tl.load(INDICES + row * most + i) * BLOCK_M
        inside = first + rows < num_queries
        q = load_rows(Q, first, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, QUERY_TAIL)
        grad_out = load_rows(GRAD_OUT, first, rows, dims, stride_gl, stride_gd, num_queries, HEAD_DIM, QUERY_TAIL)
        lse = tl.load(LSE2 + first + rows, mask=inside, other=float("inf"))
        delta = tl.load(DELTA + first + rows, mask=inside, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        if TAIL:
            weights = tl.where((keys < real)[:, None], weights, 0.0)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    GRAD_K += b * stride_ob + h * stride_oh
    GRAD_V += b * stride_pb + h * stride_ph
    store_rows(GRAD_K, start, keys, dims, stride_ol, stride_od, num_keys, grad_k * sigma, HEAD_DIM)
    store_rows(GRAD_V, start, keys, dims, stride_pl, stride_pd, num_keys, grad_v, HEAD_DIM)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels: gradients of q, k and v with their strides."""
    b, h, lq, d = q.shape
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    runtime.run(
        prepare_kernel,
        (triton.cdiv(lq, PREPARED_ROWS) * b * h,),
        *(out, grad_out, lse, grad_lse.contiguous(), delta, lse2, h, lq, *out.stride(), *grad_out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=PREPARED_ROWS,
    )
    inputs = (q, k, v, grad_out, lse2, delta)
    _walk("block_sparse_queries", sparse_queries_kernel, inputs, (grad_q,), mask, scale)
    _walk("block_sparse_keys", sparse_keys_kernel, inputs, (grad_k, grad_v), mask, scale)
    return grad_q, grad_k, grad_v


def _walk(name: str, kernel: Any, inputs: tuple, outputs: tuple, mask: BlockMask, scale: float) -> None:
    """Start one of the two kernels, a program for each list of each head."""
    q, k, v, grad_out = inputs[:4]
    (b, h, lq, d), lk = q.shape, k.shape[2]
    choice = launch(row_of(name, q.dtype), runtime.architecture(q.device), d)
    by_query = kernel is sparse_queries_kernel
    choice = fitted(choice, mask.block_m, mask.block_n, owns_keys=not by_query)
    lists = mask.refined(choice.block_m, choice.block_n)
    owned = lists if by_query else lists.transposed()
    num_tiles = triton.cdiv(lq, choice.block_m) if by_query else triton.cdiv(lk, choice.block_n)
    indices, counts, _, *numbers = owned.arguments()
    runtime.run(
        kernel,
        (num_tiles * b * h,),
        *(*inputs, *outputs, indices, counts, lists.arguments()[2]),
        *(scale / math.log(2), scale, h, lq, lk, *numbers),
        *(stride for x in (q, k, v, grad_out, *outputs) for stride in x.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        PRECISION=precision(q.dtype),
        TAIL=lists.has_gaps(lk),
        QUERY_TAIL=lq != lists.num_rows * choice.block_m,
        HAS_LENGTHS=lists.lengths is not None,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The two kernels for the ahead-of-time gate."""
    kernels = (("block_sparse_queries", sparse_queries_kernel, 6), ("block_sparse_keys", sparse_keys_kernel, 8))
    return tuple(sparse_case(name, kernel, *case, flops) for name, kernel, flops in kernels for case in CASES)
