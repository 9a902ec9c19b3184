"""Dense attention, backward: the weights are computed again from q, k and lse, never stored.

    P = exp(S - lse)                        D = rowsum(dO * O) - dlse
    dV = P^T dO      dS = P * (dO V^T - D)      dQ = sigma dS K      dK = sigma dS^T Q

(Dao et al. 2022, FlashAttention, arXiv 2205.14135, appendix B.) Three kernels, each of which owns what it writes:

    prepare    one pass over dO and O: D, and lse in base 2 with +inf for empty rows, so that 2^(s - lse) is 0 there
    keys       a program owns BLOCK_N keys and walks over the queries: dK, dV; tiles transposed, P^T = 2^(K Q^T - lse)
    queries    a program owns BLOCK_M queries and walks over the keys: dQ

FlashAttention's own kernel computes S once and adds to dQ from many programs with atomics, in an order that changes
from run to run. Computing S twice costs 7 products of matrices instead of 5 and gives the same bits every time, so a
training run can be resumed and tested bit for bit. What is left over of whole tiles is walked as in `forward.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.softmax_tiles import kernel_mask, masked_scores
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of
from diffusion_opt.kernels.tiles import LOG2_E, head_of, load_rows, precision, program_of_head

PREPARED_ROWS = 64  # a pass over memory: the tile hardly matters


@triton.jit
def prepare_kernel(
    OUT, GRAD_OUT, LSE, GRAD_LSE, DELTA, LSE2, num_heads, num_queries, out_strides, grad_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D = rowsum(dO * O) - dlse and lse / ln 2 of BLOCK_M queries; all but O and dO are contiguous (b, h, lq)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    OUT, GRAD_OUT = head_of(OUT, out_strides, b, h), head_of(GRAD_OUT, grad_strides, b, h)
    out = load_rows(OUT, start, rows, dims, out_strides, num_queries, HEAD_DIM, True).to(tl.float32)
    grad_out = load_rows(GRAD_OUT, start, rows, dims, grad_strides, num_queries, HEAD_DIM, True).to(tl.float32)
    place = head * num_queries + start + rows
    inside = start + rows < num_queries
    lse = tl.load(LSE + place, mask=inside, other=0.0)
    grad_lse = tl.load(GRAD_LSE + place, mask=inside, other=0.0)
    tl.store(DELTA + place, tl.sum(out * grad_out, 1) - grad_lse, mask=inside)
    tl.store(LSE2 + place, tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E), mask=inside)


@triton.jit
def add_queries(
    k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, start, last, keys, num_keys,
    q_strides, grad_strides, mask_strides,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add what a tile of queries from `start` on contributes to the gradients of a tile of keys (dK without sigma)."""
    dims, rows = tl.arange(0, k.shape[1]), tl.arange(0, BLOCK_M)
    q = load_rows(Q, start, rows, dims, q_strides, last, HEAD_DIM, TAIL)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    if KIND != "none":
        inside = (keys < num_keys)[:, None]
        queries = tl.zeros([1], tl.int32) if PER_KEY else start + rows
        if not PER_KEY:
            inside = inside & (start + rows < last)[None, :]
        scores = masked_scores(scores, MASK, keys, queries, mask_strides[3], mask_strides[2], inside, KIND)
    if TAIL:
        lse = tl.load(LSE2 + start + rows, mask=start + rows < last, other=float("inf"))
        delta = tl.load(DELTA + start + rows, mask=start + rows < last, other=0.0)
    else:
        lse = tl.load(LSE2 + start + rows)
        delta = tl.load(DELTA + start + rows)
    weights = tl.exp2(scores - lse[None, :])
    grad_out = load_rows(GRAD_OUT, start, rows, dims, grad_strides, last, HEAD_DIM, TAIL)
    grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
    grad_scores = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def keys_kernel(
    Q, K, V, MASK, GRAD_OUT, LSE2, DELTA, GRAD_K, GRAD_V, scale, sigma, num_heads, num_queries, num_keys,
    q_strides, k_strides, v_strides, mask_strides, grad_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """dK and dV (contiguous (b, h, lk, d)) of BLOCK_N keys of one head; `scale` is sigma log2 e."""
    tile, head, b, h = program_of_head(num_keys, num_heads, BLOCK_N)
    start = tile * BLOCK_N
    Q, GRAD_OUT = head_of(Q, q_strides, b, h), head_of(GRAD_OUT, grad_strides, b, h)
    MASK = head_of(MASK, mask_strides, b, h)
    LSE2 += head * num_queries
    DELTA += head * num_queries
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    k = load_rows(head_of(K, k_strides, b, h), start, keys, dims, k_strides, num_keys, HEAD_DIM, True)
    v = load_rows(head_of(V, v_strides, b, h), start, keys, dims, v_strides, num_keys, HEAD_DIM, True)
    grad_k = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    whole = 0 if FORM == "inside" else num_queries // BLOCK_M * BLOCK_M
    for first in range(0, whole, BLOCK_M):
        grad_k, grad_v = add_queries(
            k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, first, whole, start + keys, num_keys,
            q_strides, grad_strides, mask_strides, HEAD_DIM, BLOCK_M, KIND, PER_KEY, PRECISION, False,
        )  # fmt: skip
    if FORM == "peeled":
        if whole < num_queries:
            grad_k, grad_v = add_queries(
                k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, whole, num_queries, start + keys, num_keys,
                q_strides, grad_strides, mask_strides, HEAD_DIM, BLOCK_M, KIND, PER_KEY, PRECISION, True,
            )  # fmt: skip
    else:
        for first in range(whole, num_queries, BLOCK_M):
            grad_k, grad_v = add_queries(
                k, v, grad_k, grad_v, Q, GRAD_OUT, LSE2, DELTA, MASK, scale, first, num_queries, start + keys, num_keys,
                q_strides, grad_strides, mask_strides, HEAD_DIM, BLOCK_M, KIND, PER_KEY, PRECISION, True,
            )  # fmt: skip
    place = (head * num_keys + start + keys)[:, None] * HEAD_DIM + dims[None, :]
    inside = (start + keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(GRAD_K + place, (grad_k * sigma).to(GRAD_K.dtype.element_ty), mask=inside)
    tl.store(GRAD_V + place, grad_v.to(GRAD_V.dtype.element_ty), mask=inside)


@triton.jit
def add_keys(
    q, grad_out, lse, delta, grad_q, K, V, MASK, scale, start, last, queries, num_queries,
    k_strides, v_strides, mask_strides,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add what a tile of keys from `start` on contributes to the gradient of a tile of queries (without sigma)."""
    dims, keys = tl.arange(0, q.shape[1]), tl.arange(0, BLOCK_N)
    k = load_rows(K, start, keys, dims, k_strides, last, HEAD_DIM, TAIL)
    v = load_rows(V, start, keys, dims, v_strides, last, HEAD_DIM, TAIL)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if KIND != "none":
        inside = (start + keys < last)[None, :]
        rows = tl.zeros([1], tl.int32) if PER_KEY else queries
        if not PER_KEY:
            inside = inside & (queries < num_queries)[:, None]
        scores = masked_scores(scores, MASK, rows, start + keys, mask_strides[2], mask_strides[3], inside, KIND)
    elif TAIL:
        scores = tl.where((start + keys < last)[None, :], scores, -float("inf"))
    weights = tl.exp2(scores - lse[:, None])
    grad_scores = weights * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)


@triton.jit
def queries_kernel(
    Q, K, V, MASK, GRAD_OUT, LSE2, DELTA, GRAD_Q, scale, sigma, num_heads, num_queries, num_keys,
    q_strides, k_strides, v_strides, mask_strides, grad_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous (b, h, lq, d)) of BLOCK_M queries of one head; `scale` is sigma log2 e."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K, V, MASK = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h), head_of(MASK, mask_strides, b, h)
    Q, GRAD_OUT = head_of(Q, q_strides, b, h), head_of(GRAD_OUT, grad_strides, b, h)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(Q, start, rows, dims, q_strides, num_queries, HEAD_DIM, True)
    grad_out = load_rows(GRAD_OUT, start, rows, dims, grad_strides, num_queries, HEAD_DIM, True)
    lse = tl.load(LSE2 + head * num_queries + start + rows, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + head * num_queries + start + rows, mask=inside, other=0.0)
    grad_q = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    whole = 0 if FORM == "inside" else num_keys // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        grad_q = add_keys(
            q, grad_out, lse, delta, grad_q, K, V, MASK, scale, first, whole, start + rows, num_queries,
            k_strides, v_strides, mask_strides, HEAD_DIM, BLOCK_N, KIND, PER_KEY, PRECISION, False,
        )  # fmt: skip
    if FORM == "peeled":
        if whole < num_keys:
            grad_q = add_keys(
                q, grad_out, lse, delta, grad_q, K, V, MASK, scale, whole, num_keys, start + rows, num_queries,
                k_strides, v_strides, mask_strides, HEAD_DIM, BLOCK_N, KIND, PER_KEY, PRECISION, True,
            )  # fmt: skip
    else:
        for first in range(whole, num_keys, BLOCK_N):
            grad_q = add_keys(
                q, grad_out, lse, delta, grad_q, K, V, MASK, scale, first, num_keys, start + rows, num_queries,
                k_strides, v_strides, mask_strides, HEAD_DIM, BLOCK_N, KIND, PER_KEY, PRECISION, True,
            )  # fmt: skip
    place = (head * num_queries + start + rows)[:, None] * HEAD_DIM + dims[None, :]
    inside = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(GRAD_Q + place, (grad_q * sigma).to(GRAD_Q.dtype.element_ty), mask=inside)


def prepare(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the first kernel: D and the lse in base 2, both (b, h, lq) in float32."""
    b, h, lq, d = out.shape
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    runtime.run(
        prepare_kernel,
        (triton.cdiv(lq, PREPARED_ROWS) * b * h,),
        *(out, grad_out, lse, grad_lse.contiguous(), delta, lse2, h, lq, out.stride(), grad_out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=PREPARED_ROWS,
    )
    return delta, lse2


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
    delta, lse2 = prepare(out, grad_out, lse, grad_lse)
    kind, mask, mask_strides = kernel_mask(mask, q)
    inputs = (q, k, v, mask, grad_out, lse2, delta)
    numbers = (scale / math.log(2), scale, h, lq, lk)
    strides = (q.stride(), k.stride(), v.stride(), mask_strides, grad_out.stride())
    for name, kernel, results in (("keys", keys_kernel, grads[1:]), ("queries", queries_kernel, grads[:1])):
        choice = launch(row_of(f"dense_{name}", q.dtype, kind != "none"), runtime.architecture(q.device), d)
        num_tiles = triton.cdiv(lk, choice.block_n) if name == "keys" else triton.cdiv(lq, choice.block_m)
        runtime.run(
            kernel,
            (num_tiles * b * h,),
            *(*inputs, *results, *numbers, *strides),
            HEAD_DIM=d,
            PADDED_DIM=padded_head_dim(d),
            KIND=kind,
            PER_KEY=mask_strides[2] == 0,
            PRECISION=precision(q.dtype),
            FORM=choice.form,
            **choice.tuning(),
        )
    return grads
