"""FP4 attention, backward: the gradient of `oracle.py` in two Triton kernels, deterministic.

Scores are computed again from the quantized q and k, and weights rounded again to the same bits as in the forward pass
(a tile's weights are relative to its own largest, so the order in which tiles are met does not matter):

    keys_kernel       owns 64 keys, walks queries:   dV = Pq^T dO,    dK = sigma dS^T (a + m)
    queries_kernel    owns queries, walks keys:      dQ = sigma dS b
    dS = P * (dO Q(v)^T - delta),    delta = dO . O_hp

Nothing is added up across programs. Against the backward pass of dense attention three things differ, and each matters:
the scores, the rounded weights in dV only, and delta, which comes from O_hp and not from O.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.fp4.forward import (
    KEY_TILE,
    QUERY_TILE,
    local_weights,
    round_weights,
    scores_of_tile,
    shape_constants,
)
from diffusion_opt.kernels.attention.fp4.oracle import Fp4Operands
from diffusion_opt.kernels.attention.softmax_tiles import kernel_mask
from diffusion_opt.kernels.launch import launch, row_of
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK
from diffusion_opt.kernels.quantizers.rounding import NVFP4_MAX
from diffusion_opt.kernels.tiles import head_of, load_rows, program_of_head


@triton.jit
def row_factors(tile_peak, lse):
    """What a tile's local weights are multiplied with to become probabilities: 2^(peak - lse), 0 for closed tiles."""
    return tl.where(tile_peak == -float("inf"), 0.0, tl.exp2(tile_peak - lse))


@triton.jit
def keys_kernel(
    Q, Q_SCALES, Q_MEAN, K, K_SCALES, V, V_SCALES, GIVEN_BACK, MASK, GRAD_OUT, LSE2, DELTA, GRAD_K, GRAD_V,
    scale, sigma, num_heads, num_queries, num_keys, mask_strides,
    grad_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr,
    SMOOTH_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV (contiguous) of KEY_TILE keys of one head; `scale` is sigma log2 e, LSE2 in base 2."""
    num_tiles = tl.cdiv(num_keys, KEY_TILE)
    num_query_tiles = tl.cdiv(num_queries, QUERY_TILE)
    tile, head, b, h = program_of_head(num_keys, num_heads, KEY_TILE)
    MASK = head_of(MASK, mask_strides, b, h)
    GRAD_OUT = head_of(GRAD_OUT, grad_strides, b, h)
    Q += head * num_queries * HEAD_DIM
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, KEY_TILE), tl.arange(0, PADDED_DIM)
    first = tile * KEY_TILE
    k = load_rows(K + head * num_keys * HEAD_DIM, first, keys, dims, (0, 0, HEAD_DIM, 1), num_keys, HEAD_DIM, True)
    v = load_rows(V + head * num_keys * HEAD_DIM, first, keys, dims, (0, 0, HEAD_DIM, 1), num_keys, HEAD_DIM, True)
    v_unit = tl.load(V_SCALES + head * num_tiles + tile)
    grad_k = tl.zeros([KEY_TILE, PADDED_DIM], tl.float32)
    grad_v = tl.zeros([KEY_TILE, PADDED_DIM], tl.float32)
    for start in range(0, num_queries, BLOCK_M):
        query_tile = head * num_query_tiles + start // QUERY_TILE
        q_unit = tl.load(Q_SCALES + query_tile)
        q = load_rows(Q, start, rows, dims, (0, 0, HEAD_DIM, 1), num_queries, HEAD_DIM, True)
        grad_out = load_rows(GRAD_OUT, start, rows, dims, grad_strides, num_queries, HEAD_DIM, True)
        place = head * num_queries + start + rows
        lse = tl.load(LSE2 + place, mask=start + rows < num_queries, other=float("inf"))
        delta = tl.load(DELTA + place, mask=start + rows < num_queries, other=0.0)
        scores = scores_of_tile(
            q, k, q_unit, K_SCALES + head * num_tiles, GIVEN_BACK + query_tile * num_keys, MASK, first, start, rows,
            num_queries, num_keys, mask_strides, scale, KIND, SMOOTH_Q,
        )  # fmt: skip
        p, tile_peak = local_weights(scores)
        factor = row_factors(tile_peak, lse)[:, None]
        rounded = (round_weights(p) * (factor * (1 / NVFP4_MAX))).to(grad_out.dtype)
        grad_v = tl.dot(tl.trans(rounded), grad_out, grad_v, input_precision=PRECISION)
        grad_p = tl.dot(grad_out, tl.trans(v).to(grad_out.dtype), input_precision=PRECISION) * v_unit
        grad_scores = p * factor * (grad_p - delta[:, None])
        queries = q.to(tl.float32) * q_unit
        if SMOOTH_Q:
            queries += tl.load(Q_MEAN + query_tile * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)[None, :]
        grad_k = tl.dot(tl.trans(grad_scores.to(q.dtype)), queries.to(q.dtype), grad_k, input_precision=PRECISION)
    place = (head * num_keys + first + keys)[:, None] * HEAD_DIM + dims[None, :]
    real = (first + keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(GRAD_K + place, (grad_k * sigma).to(GRAD_K.dtype.element_ty), mask=real)
    tl.store(GRAD_V + place, grad_v.to(GRAD_V.dtype.element_ty), mask=real)


@triton.jit
def queries_kernel(
    Q, Q_SCALES, K, K_SCALES, V, V_SCALES, GIVEN_BACK, MASK, GRAD_OUT, LSE2, DELTA, GRAD_Q,
    scale, sigma, num_heads, num_queries, num_keys, mask_strides,
    grad_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr,
    SMOOTH_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous) of BLOCK_M queries of one head."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K += head * num_keys * HEAD_DIM
    V += head * num_keys * HEAD_DIM
    K_SCALES += head * tl.cdiv(num_keys, KEY_TILE)
    V_SCALES += head * tl.cdiv(num_keys, KEY_TILE)
    MASK = head_of(MASK, mask_strides, b, h)
    GRAD_OUT = head_of(GRAD_OUT, grad_strides, b, h)
    query_tile = head * tl.cdiv(num_queries, QUERY_TILE) + start // QUERY_TILE
    q_unit = tl.load(Q_SCALES + query_tile)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, KEY_TILE), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(
        Q + head * num_queries * HEAD_DIM, start, rows, dims, (0, 0, HEAD_DIM, 1), num_queries, HEAD_DIM, True
    )
    grad_out = load_rows(GRAD_OUT, start, rows, dims, grad_strides, num_queries, HEAD_DIM, True)
    lse = tl.load(LSE2 + head * num_queries + start + rows, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + head * num_queries + start + rows, mask=inside, other=0.0)
    grad_q = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for first in range(0, num_keys, KEY_TILE):
        k = load_rows(K, first, keys, dims, (0, 0, HEAD_DIM, 1), num_keys, HEAD_DIM, True)
        v = load_rows(V, first, keys, dims, (0, 0, HEAD_DIM, 1), num_keys, HEAD_DIM, True)
        scores = scores_of_tile(
            q, k, q_unit, K_SCALES, GIVEN_BACK + query_tile * num_keys, MASK, first, start, rows, num_queries,
            num_keys, mask_strides, scale, KIND, SMOOTH_Q,
        )  # fmt: skip
        p, tile_peak = local_weights(scores)
        grad_p = tl.dot(grad_out, tl.trans(v).to(grad_out.dtype), input_precision=PRECISION)
        grad_p *= tl.load(V_SCALES + first // KEY_TILE)
        grad_scores = p * row_factors(tile_peak, lse)[:, None] * (grad_p - delta[:, None])
        grad_scores *= tl.load(K_SCALES + first // KEY_TILE)
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    place = (head * num_queries + start + rows)[:, None] * HEAD_DIM + dims[None, :]
    real = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(GRAD_Q + place, (grad_q * sigma).to(GRAD_Q.dtype.element_ty), mask=real)


def backward(
    grad_out: Tensor, x: Fp4Operands, mask: Tensor | None, scale: float, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels: gradients of q, k and v, contiguous, in the type of the operands."""
    b, h, lq, d = x.q.shape
    lk = x.k.shape[2]
    grads = tuple(torch.empty(t.shape, dtype=x.q.dtype, device=x.q.device) for t in (x.q, x.k, x.v))
    arch = runtime.architecture(x.q.device)
    lse2 = lse / math.log(2)
    kind, mask, mask_strides = kernel_mask(mask, x.q)
    queries = (x.q, x.q_scales)
    given_back, mean = (lse, lse) if x.given_back is None else (x.given_back, x.q_mean)
    others = (x.k, x.k_scales, x.v, x.v_scales, given_back, mask, grad_out, lse2, delta)
    numbers = (scale / math.log(2), scale, h, lq, lk, mask_strides, grad_out.stride())
    shape = shape_constants(d, kind, x.given_back is not None, x.q.dtype)
    choice = launch(row_of("fp4_keys", x.q.dtype, kind != "none"), arch, d)
    tuning = {"BLOCK_M": choice.block_m, "num_warps": choice.num_warps, "num_stages": choice.num_stages}
    grid = (triton.cdiv(lk, KEY_BLOCK) * b * h,)
    runtime.run(keys_kernel, grid, *queries, mean, *others, *grads[1:], *numbers, **shape, **tuning)
    choice = launch(row_of("fp4_queries", x.q.dtype, kind != "none"), arch, d)
    tuning = {"BLOCK_M": choice.block_m, "num_warps": choice.num_warps, "num_stages": choice.num_stages}
    grid = (triton.cdiv(lq, choice.block_m) * b * h,)
    runtime.run(queries_kernel, grid, *queries, *others, grads[0], *numbers, **shape, **tuning)
    return grads
