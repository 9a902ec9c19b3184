"""FP4 attention, forward: NVFP4 queries, keys, values and weights, on the matrix units of any GPU from sm_80 on.

What is computed, `oracle.py` says. The operands come as e2m1 codes already multiplied by their e4m3 block
scales, in bfloat16, float16 or float32, which hold these products exactly, and one float32 scale for each tile of
tokens. So the matrix units multiply the very numbers that FP4 units would, at the speed of bfloat16: this is the path
to train and to measure FP4 attention anywhere, and a simulation: it is never faster than bfloat16. On sm_100 and sm_120
there are instructions for the codes themselves, and `blackwell.py` has the forward pass that uses them.

Per tile of 64 keys, with t_i the row's largest score in it:

    p = 2^(s - t),   w = round(2688 p),   norm += 2^(t - peak) sum_j p,   total += 2^(t - peak) s_v / 2688  w v

A tile's weights are relative to its own peak, which is why rounding does not depend on the order of tiles; the factor
2^(t - peak) reaches the total with the tile scale of v, in one multiplication. For training, a second total with p in
place of w / 2688 gives O_hp. Forward and backward share `scores_of_tile` and `round_weights`, hence their bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.fp4.oracle import Fp4Operands
from diffusion_opt.kernels.attention.softmax_tiles import kernel_mask, masked_scores
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of
from diffusion_opt.kernels.quantizers import oracle as quantize
from diffusion_opt.kernels.quantizers.rounding import (
    E2M1_MAX,
    E4M3_MIN,
    NVFP4_BLOCK,
    NVFP4_MAX,
    at_least,
    largest,
    round_e2m1,
    round_positive_e4m3,
)
from diffusion_opt.kernels.tiles import LN_2, head_of, load_rows, precision, program_of_head, store_rows

QUERY_TILE = tl.constexpr(quantize.QUERY_BLOCK)
KEY_TILE = tl.constexpr(quantize.KEY_BLOCK)


@triton.jit
def scores_of_tile(
    q, k, q_unit, K_SCALES, GIVEN_BACK, MASK, start, first_query, rows, num_queries, num_keys,
    mask_strides, scale, KIND: tl.constexpr, SMOOTH_Q: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of a tile of KEY_TILE keys from `start` on, -inf where there is no key or the mask is closed.

    `scale` is sigma log2 e; GIVEN_BACK points to the row of the queries' block.
    """
    keys = start + tl.arange(0, KEY_TILE)
    unit = q_unit * tl.load(K_SCALES + start // KEY_TILE)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32") * unit  # exact for float32 too: 6 significant bits of 11
    if SMOOTH_Q:
        scores += tl.load(GIVEN_BACK + keys, mask=keys < num_keys, other=0.0)[None, :]
    scores *= scale
    inside = (keys < num_keys)[None, :]
    if KIND == "none":
        scores = tl.where(inside, scores, -float("inf"))
    else:
        inside = inside & (first_query + rows < num_queries)[:, None]
        scores = masked_scores(scores, MASK, first_query + rows, keys, mask_strides[2], mask_strides[3], inside, KIND)
    return scores


@triton.jit
def local_weights(scores):
    """Weights relative to the largest of the tile in their row, and its score: zeros and -inf if all are closed."""
    peak = tl.max(scores, 1)
    origin = tl.where(peak == -float("inf"), 0.0, peak)
    return tl.exp2(scores - origin[:, None]), peak


@triton.jit
def round_weights(p):
    """2688 p in NVFP4, blocks of 16 keys: what the second matrix product takes."""
    blocks = tl.reshape(p * NVFP4_MAX, (p.shape[0], p.shape[1] // NVFP4_BLOCK, NVFP4_BLOCK))
    sizes = largest(blocks, 2)
    relative = tl.div_rn(sizes, tl.full(sizes.shape, E2M1_MAX, tl.float32))
    scales = round_positive_e4m3(at_least(relative, E4M3_MIN))
    inverse = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    return tl.reshape(round_e2m1(blocks * inverse[:, :, None]) * scales[:, :, None], p.shape)


@triton.jit
def fp4_forward_kernel(
    Q, Q_SCALES, K, K_SCALES, V, V_SCALES, GIVEN_BACK, MASK, OUT, OUT_HP, LSE, scale, num_heads, num_queries, num_keys,
    mask_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr,
    SMOOTH_Q: tl.constexpr, FOR_TRAINING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse (contiguous) of BLOCK_M queries of one head, and for training O_hp (contiguous)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K += head * num_keys * HEAD_DIM
    V += head * num_keys * HEAD_DIM
    K_SCALES += head * tl.cdiv(num_keys, KEY_TILE)
    V_SCALES += head * tl.cdiv(num_keys, KEY_TILE)
    MASK = head_of(MASK, mask_strides, b, h)
    query_tile = head * tl.cdiv(num_queries, QUERY_TILE) + start // QUERY_TILE
    GIVEN_BACK += query_tile * num_keys
    q_unit = tl.load(Q_SCALES + query_tile)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, KEY_TILE), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(
        Q + head * num_queries * HEAD_DIM, start, rows, dims, (0, 0, HEAD_DIM, 1), num_queries, HEAD_DIM, True
    )
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    total_hp = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for first in range(0, num_keys, KEY_TILE):
        k = load_rows(K, first, keys, dims, (0, 0, HEAD_DIM, 1), num_keys, HEAD_DIM, True)
        scores = scores_of_tile(
            q, k, q_unit, K_SCALES, GIVEN_BACK, MASK, first, start, rows, num_queries, num_keys,
            mask_strides, scale, KIND, SMOOTH_Q,
        )  # fmt: skip
        p, tile_peak = local_weights(scores)
        new_peak = tl.maximum(peak, tile_peak)
        origin = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        correction, weight = tl.exp2(peak - origin), tl.exp2(tile_peak - origin)
        norm = norm * correction + tl.sum(p, 1) * weight
        v = load_rows(V, first, keys, dims, (0, 0, HEAD_DIM, 1), num_keys, HEAD_DIM, True)
        weight *= tl.load(V_SCALES + first // KEY_TILE)
        part = tl.dot(round_weights(p).to(v.dtype), v, input_precision="tf32")  # exact, as the scores are
        total = total * correction[:, None] + part * (weight * (1 / NVFP4_MAX))[:, None]
        if FOR_TRAINING:
            part = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            total_hp = total_hp * correction[:, None] + part * weight[:, None]
        peak = new_peak
    tl.store(LSE + head * num_queries + start + rows, (peak + tl.log2(norm)) * LN_2, mask=inside)
    norm = tl.where(norm == 0.0, 1.0, norm)
    real = inside[:, None] & (dims < HEAD_DIM)[None, :]
    out = total / norm[:, None]
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)
    if FOR_TRAINING:
        place = (head * num_queries + start + rows)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(OUT_HP + place, total_hp / norm[:, None], mask=real)


def shape_constants(head_dim: int, kind: str, smooth_q: bool, dtype: torch.dtype) -> dict[str, object]:
    """The constexpr arguments that the three FP4 kernels share, tiles excepted."""
    shape = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim), "KIND": kind}
    return {**shape, "SMOOTH_Q": smooth_q, "PRECISION": precision(dtype)}


def forward(x: Fp4Operands, mask: Tensor | None, scale: float, out: Tensor, out_hp: Tensor | None) -> Tensor:
    """Launch the kernel: fill `out` and, if given, `out_hp` (float32, contiguous); the lse (b, h, lq) in float32."""
    b, h, lq, d = x.q.shape
    lse = torch.empty(b, h, lq, dtype=torch.float32, device=x.q.device)
    kind, mask, mask_strides = kernel_mask(mask, x.q)
    choice = launch(row_of("fp4_forward", x.q.dtype, kind != "none"), runtime.architecture(x.q.device), d)
    runtime.run(
        fp4_forward_kernel,
        (triton.cdiv(lq, choice.block_m) * b * h,),
        *(x.q, x.q_scales, x.k, x.k_scales, x.v, x.v_scales, lse if x.given_back is None else x.given_back, mask),
        *(out, lse if out_hp is None else out_hp, lse, scale / math.log(2), h, lq, x.k.shape[2]),
        *(mask_strides, out.stride()),
        **shape_constants(d, kind, x.given_back is not None, x.q.dtype),
        BLOCK_M=choice.block_m,
        FOR_TRAINING=out_hp is not None,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return lse
