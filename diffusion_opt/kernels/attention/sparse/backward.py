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
from diffusion_opt.kernels.attention.dense.backward import prepare
from diffusion_opt.kernels.attention.softmax_tiles import fitted, real_keys, softmax_again
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of
from diffusion_opt.kernels.tiles import head_of, load_rows, precision, program_of_head, store_rows


@triton.jit
def sparse_queries_kernel(
    Q, K, V, GRAD_OUT, LSE2, DELTA, GRAD_Q, INDICES, COUNTS, LENGTHS,
    scale, sigma, num_heads, num_queries, num_keys, list_b, list_h, most,
    q_strides, k_strides, v_strides, grad_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, QUERY_TAIL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries; `scale` is sigma log2 e, LSE2 the lse in base 2."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    Q, GRAD_OUT = head_of(Q, q_strides, b, h), head_of(GRAD_OUT, grad_strides, b, h)
    K, V = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(Q, start, rows, dims, q_strides, num_queries, HEAD_DIM, QUERY_TAIL)
    grad_out = load_rows(GRAD_OUT, start, rows, dims, grad_strides, num_queries, HEAD_DIM, QUERY_TAIL)
    lse = tl.load(LSE2 + head * num_queries + start + rows, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + head * num_queries + start + rows, mask=inside, other=0.0)
    grad_q = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row = b * list_b + h * list_h + tile
    for i in range(tl.load(COUNTS + row)):
        block = tl.load(INDICES + row * most + i)
        first = block * BLOCK_N
        real = real_keys(LENGTHS, block, num_keys, BLOCK_N, HAS_LENGTHS)
        k = load_rows(K, first, keys, dims, k_strides, first + real, HEAD_DIM, TAIL)
        v = load_rows(V, first, keys, dims, v_strides, first + real, HEAD_DIM, TAIL)
        weights = softmax_again(q, k, lse, real, scale, BLOCK_N, PRECISION, TAIL)
        grad_scores = weights * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    store_rows(
        head_of(GRAD_Q, out_strides, b, h), start, rows, dims, out_strides, num_queries, grad_q * sigma, HEAD_DIM
    )


@triton.jit
def sparse_keys_kernel(
    Q, K, V, GRAD_OUT, LSE2, DELTA, GRAD_K, GRAD_V, INDICES, COUNTS, LENGTHS,
    scale, sigma, num_heads, num_queries, num_keys, list_b, list_h, most,
    q_strides, k_strides, v_strides, grad_strides, out_strides, value_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, QUERY_TAIL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, by the transposed lists; tiles are transposed too: weights stay in registers."""
    tile, head, b, h = program_of_head(num_keys, num_heads, BLOCK_N)
    start = tile * BLOCK_N
    Q, GRAD_OUT = head_of(Q, q_strides, b, h), head_of(GRAD_OUT, grad_strides, b, h)
    K, V = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h)
    LSE2 += head * num_queries
    DELTA += head * num_queries
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    real = real_keys(LENGTHS, tile, num_keys, BLOCK_N, HAS_LENGTHS)
    k = load_rows(K, start, keys, dims, k_strides, start + real, HEAD_DIM, TAIL)
    v = load_rows(V, start, keys, dims, v_strides, start + real, HEAD_DIM, TAIL)
    grad_k = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    row = b * list_b + h * list_h + tile
    for i in range(tl.load(COUNTS + row)):
        first = tl.load(INDICES + row * most + i) * BLOCK_M
        inside = first + rows < num_queries
        q = load_rows(Q, first, rows, dims, q_strides, num_queries, HEAD_DIM, QUERY_TAIL)
        grad_out = load_rows(GRAD_OUT, first, rows, dims, grad_strides, num_queries, HEAD_DIM, QUERY_TAIL)
        lse = tl.load(LSE2 + first + rows, mask=inside, other=float("inf"))
        delta = tl.load(DELTA + first + rows, mask=inside, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        if TAIL:
            weights = tl.where((keys < real)[:, None], weights, 0.0)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    GRAD_K, GRAD_V = head_of(GRAD_K, out_strides, b, h), head_of(GRAD_V, value_strides, b, h)
    store_rows(GRAD_K, start, keys, dims, out_strides, num_keys, grad_k * sigma, HEAD_DIM)
    store_rows(GRAD_V, start, keys, dims, value_strides, num_keys, grad_v, HEAD_DIM)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels: gradients of q, k and v with their strides."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta, lse2 = prepare(out, grad_out, lse, grad_lse)
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
        *(x.stride() for x in (q, k, v, grad_out, *outputs)),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        PRECISION=precision(q.dtype),
        TAIL=lists.has_gaps(lk),
        QUERY_TAIL=lq != lists.num_rows * choice.block_m,
        HAS_LENGTHS=lists.lengths is not None,
        **choice.tuning(),
    )
