"""FP4 attention, forward: NVFP4 queries, keys, values and weights, on the matrix units of any GPU from sm_80 on.

What is computed, `oracle.py` says. The operands come as e2m1 codes already multiplied by their e4m3 block
scales, in bfloat16, float16 or float32, which hold these products exactly, and one float32 scale for each tile of
tokens. So the matrix units multiply the very numbers that FP4 units would, at the speed of bfloat16: this is the path
to train and to measure FP4 attention anywhere. (Real FP4 instructions through `tl.dot_scaled` are missing or wrong for
NVFP4 in Triton 3.7 on every target but sm_120, and spill registers there.)

Per tile of 64 keys, with t_i the row's largest score in it:

    p = 2^(s - t),   w = round(2688 p),   norm += 2^(t - peak) sum_j p,   total += 2^(t - peak) s_v / 2688  w v

A tile's weights are relative to its own peak, which is why rounding does not depend on the order of tiles; the factor
2^(t - peak) reaches the total with the tile scale of v, in one multiplication. For training, a second total with p in
place of w / 2688 gives O_hp. Forward and backward share `scores_of_tile` and `round_weights`, hence their bits.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense.forward import OPCODES, kernel_mask, load_rows, masked_scores, precision
from diffusion_opt.kernels.attention.fp4.oracle import Fp4Operands
from diffusion_opt.kernels.gate.case import CompileCase, sampled
from diffusion_opt.kernels.launch import chosen, launch, padded_head_dim, row_of
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

LN_2 = tl.constexpr(0.6931471805599453)
QUERY_TILE = tl.constexpr(quantize.QUERY_BLOCK)
KEY_TILE = tl.constexpr(quantize.KEY_BLOCK)


@triton.jit
def scores_of_tile(
    q, k, q_unit, K_SCALES, GIVEN_BACK, MASK, start, first_query, rows, num_queries, num_keys,
    stride_mq, stride_mk, scale, KIND: tl.constexpr, SMOOTH_Q: tl.constexpr,
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
        scores = masked_scores(scores, MASK, first_query + rows, keys, stride_mq, stride_mk, inside, KIND)
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
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_oh, stride_ol, stride_od,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr,
    SMOOTH_Q: tl.constexpr, FOR_TRAINING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse (contiguous) of BLOCK_M queries of one head, and for training O_hp (contiguous)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    start = tl.program_id(0) % num_tiles * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    K += head * num_keys * HEAD_DIM
    V += head * num_keys * HEAD_DIM
    K_SCALES += head * tl.cdiv(num_keys, KEY_TILE)
    V_SCALES += head * tl.cdiv(num_keys, KEY_TILE)
    MASK += b * stride_mb + h * stride_mh
    query_tile = head * tl.cdiv(num_queries, QUERY_TILE) + start // QUERY_TILE
    GIVEN_BACK += query_tile * num_keys
    q_unit = tl.load(Q_SCALES + query_tile)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, KEY_TILE), tl.arange(0, PADDED_DIM)
    inside = start + rows < num_queries
    q = load_rows(Q + head * num_queries * HEAD_DIM, start, rows, dims, HEAD_DIM, 1, num_queries, HEAD_DIM, True)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    total_hp = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for first in range(0, num_keys, KEY_TILE):
        k = load_rows(K, first, keys, dims, HEAD_DIM, 1, num_keys, HEAD_DIM, True)
        scores = scores_of_tile(
            q, k, q_unit, K_SCALES, GIVEN_BACK, MASK, first, start, rows, num_queries, num_keys,
            stride_mq, stride_mk, scale, KIND, SMOOTH_Q,
        )  # fmt: skip
        p, tile_peak = local_weights(scores)
        new_peak = tl.maximum(peak, tile_peak)
        origin = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        correction, weight = tl.exp2(peak - origin), tl.exp2(tile_peak - origin)
        norm = norm * correction + tl.sum(p, 1) * weight
        v = load_rows(V, first, keys, dims, HEAD_DIM, 1, num_keys, HEAD_DIM, True)
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
    address = OUT + b * stride_ob + h * stride_oh + tl.cast(start, tl.int64) * stride_ol
    address += rows[:, None] * stride_ol + dims[None, :] * stride_od
    tl.store(address, (total / norm[:, None]).to(OUT.dtype.element_ty), mask=real)
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
        *(*mask_strides, *out.stride()),
        **shape_constants(d, kind, x.given_back is not None, x.q.dtype),
        BLOCK_M=choice.block_m,
        FOR_TRAINING=out_hp is not None,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return lse


CASES = (  # what the ahead-of-time gate compiles: (type, head dimension, mask)
    (torch.bfloat16, 64, "none"),
    (torch.bfloat16, 128, "none"),
    (torch.bfloat16, 128, "bias"),
    (torch.float32, 64, "none"),
)
TRITON_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def fp4_case(
    name: str, kernel: Any, dtype: torch.dtype, head_dim: int, kind: str, flops_per_dim: int, **own: bool
) -> CompileCase:
    """An FP4 kernel as a training step on smoothed q and k launches it; `own` are its own constants."""
    given = {**shape_constants(head_dim, kind, True, dtype), **own}
    ones = [argument for argument in ("stride_od", "stride_gd") if argument in kernel.arg_names]
    ones += [] if kind == "none" else ["stride_mk"]
    types = {
        "MASK": {"none": TRITON_TYPES[dtype], "bool": "*u8", "bias": "*fp32"}[kind],
        "scale": "fp32",
        "sigma": "fp32",
    }
    types |= dict.fromkeys(("Q", "K", "V", "OUT", "GRAD_OUT", "GRAD_Q", "GRAD_K", "GRAD_V"), TRITON_TYPES[dtype])
    pointers = ("Q_SCALES", "K_SCALES", "V_SCALES", "Q_MEAN", "GIVEN_BACK", "OUT_HP", "LSE", "LSE2", "DELTA")
    types |= dict.fromkeys(pointers, "*fp32") | dict.fromkeys([*given, "BLOCK_M", *ones], "constexpr")
    types = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    aligned = [a for a, kind_ in types.items() if kind_[0] == "*" or (kind_ == "i32" and a != "num_heads")]
    numbers = "fp32" if dtype == torch.float32 else "bf16"
    units = {} if dtype == torch.float32 else OPCODES
    mask = "" if kind == "none" else f" {kind} mask"
    everywhere = (dtype, head_dim, kind) == (torch.bfloat16, 128, "none")
    return CompileCase(
        name=f"{name.replace('_', ' ')} {numbers} d{head_dim}{mask}",
        kernel=kernel,
        signature=types,
        constexprs={**given, **dict.fromkeys(ones, 1)},
        divisible=tuple(aligned),
        launch=sampled(chosen(row_of(name, dtype, kind != "none"), head_dim), everywhere),
        opcodes=units,
        loop_flops={numbers: flops_per_dim * head_dim},
        loop_exps=1,
        tiles=("BLOCK_M",),
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The kernel, as used in training, for the ahead-of-time gate."""
    return tuple(fp4_case("fp4_forward", fp4_forward_kernel, *case, 6, FOR_TRAINING=True) for case in CASES)
