"""FP4 attention on FP4 matrix units: the forward pass of `forward.py` with products of packed codes.

    S = unit_q unit_k (a b^T) + given back,      total += w_row unit_v / 2688 (round(2688 p) c)

Both products are `tl.dot_scaled`: the instruction takes e2m1 codes and the e4m3 scale of each 16 of them, on sm_100
(`tcgen05.mma … kind::mxf4nvf4`) and sm_120 (`mma … kind::mxf4nvf4`), at four times the rate of bfloat16. Weights are
rounded and packed in registers. The numbers multiplied are those of the simulation, so results differ only by the order
of sums.

Triton 3.7.1 crashes on sm_100 where the accumulator is the constant zero; here it is 0 times a number known at run
time. It serves calls without mask and gradient. Because nobody has seen this code run on such a GPU, `obstacle`
compares it with the simulation on the device before the first use, once for each head dimension; if they differ or it
does not run, the simulation stays in use, and `obstacle` says why.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.fp4 import forward as simulation
from diffusion_opt.kernels.attention.fp4.forward import KEY_TILE, QUERY_TILE, local_weights
from diffusion_opt.kernels.attention.fp4.packed import PackedOperands, pack
from diffusion_opt.kernels.attention.softmax_tiles import start_softmax
from diffusion_opt.kernels.launch import LAUNCH, LaunchConfig, chosen, padded_head_dim
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
from diffusion_opt.kernels.tiles import LN_2, head_of, program_of_head, store_rows

ROW = "fp4_forward_packed"
PROBED_QUERIES, PROBED_KEYS = 200, 330
E2M1 = tl.constexpr("e2m1")


@triton.jit
def packed_weights(p):
    """2688 p in NVFP4 as bytes (rows, keys / 2), and the scales (rows, keys / 16) of blocks of 16 keys."""
    ROWS: tl.constexpr = p.shape[0]
    KEYS: tl.constexpr = p.shape[1]
    blocks = tl.reshape(p * NVFP4_MAX, (ROWS, KEYS // NVFP4_BLOCK, NVFP4_BLOCK))
    sizes = largest(blocks, 2)
    relative = tl.div_rn(sizes, tl.full(sizes.shape, E2M1_MAX, tl.float32))
    scales = round_positive_e4m3(at_least(relative, E4M3_MIN))
    inverse = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    rounded = round_e2m1(blocks * inverse[:, :, None])  # 0 or more: weights have no sign
    code = tl.where(rounded < 2.0, 2.0 * rounded, tl.where(rounded < 4.0, rounded + 2.0, 0.5 * rounded + 4.0))
    low, high = tl.split(tl.reshape(code.to(tl.uint8), (ROWS, KEYS // 2, 2)))
    return low | (high << 4), scales.to(tl.float8e4nv)


@triton.jit
def load_packed(CODES, SCALES, rows, columns, row_bytes, LENGTH: tl.constexpr):
    """Codes (rows, LENGTH / 2) and scales (rows, LENGTH / 16) from code number 2 `columns` on."""
    halves, blocks = tl.arange(0, LENGTH // 2), tl.arange(0, LENGTH // NVFP4_BLOCK)
    place = rows.to(tl.int64)[:, None] * row_bytes + columns
    codes = tl.load(CODES + place + halves[None, :])
    return codes, tl.load(SCALES + place // 8 + blocks[None, :])


@triton.jit
def packed_kernel(
    Q, Q_SCALES, Q_UNITS, K, K_SCALES, K_UNITS, V, V_SCALES, V_UNITS, GIVEN_BACK, OUT, LSE,
    scale, num_heads, num_queries, num_keys, out_strides,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, SMOOTH_Q: tl.constexpr,
):  # fmt: skip
    """Output and lse (contiguous) of BLOCK_M queries of one head; `scale` is sigma log2 e."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    HALF: tl.constexpr = HEAD_DIM // 2
    query_tiles, key_tiles = tl.cdiv(num_queries, QUERY_TILE), tl.cdiv(num_keys, KEY_TILE)
    query_tile = head * query_tiles + start // QUERY_TILE
    first_query, first_key = head * query_tiles * QUERY_TILE, head * key_tiles * KEY_TILE
    q_unit = tl.load(Q_UNITS + query_tile)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, KEY_TILE), tl.arange(0, HEAD_DIM)
    q, q_scales = load_packed(Q, Q_SCALES, first_query + start + rows, 0, HALF, HEAD_DIM)
    peak, norm, total = start_softmax(BLOCK_M, HEAD_DIM)
    no_scores = tl.broadcast_to((rows.to(tl.float32) * (q_unit * 0.0))[:, None], (BLOCK_M, KEY_TILE))
    for first in range(0, num_keys, KEY_TILE):
        block = head * key_tiles + first // KEY_TILE
        k, k_scales = load_packed(K, K_SCALES, first_key + first + keys, 0, HALF, HEAD_DIM)
        scores = tl.dot_scaled(q, q_scales, E2M1, tl.trans(k), k_scales, E2M1, no_scores)
        scores *= q_unit * tl.load(K_UNITS + block)
        inside = first + keys < num_keys
        if SMOOTH_Q:
            scores += tl.load(GIVEN_BACK + query_tile * num_keys + first + keys, mask=inside, other=0.0)[None, :]
        p, tile_peak = local_weights(tl.where(inside[None, :], scores * scale, -float("inf")))
        new_peak = tl.maximum(peak, tile_peak)
        correction, weight = tl.exp2(peak - new_peak), tl.exp2(tile_peak - new_peak)
        norm = norm * correction + tl.sum(p, 1) * weight
        codes, scales = packed_weights(p)
        columns = first // 2
        v, v_scales = load_packed(V, V_SCALES, head * HEAD_DIM + dims, columns, key_tiles * (KEY_TILE // 2), KEY_TILE)
        nothing = tl.broadcast_to((weight * 0.0)[:, None], (BLOCK_M, HEAD_DIM))
        part = tl.dot_scaled(codes, scales, E2M1, tl.trans(v), v_scales, E2M1, nothing)
        weight *= tl.load(V_UNITS + block) * (1 / NVFP4_MAX)
        total = total * correction[:, None] + part * weight[:, None]
        peak = new_peak
    tl.store(LSE + head * num_queries + start + rows, (peak + tl.log2(norm)) * LN_2, mask=start + rows < num_queries)
    out = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)


def forward(x: PackedOperands, scale: float, out: Tensor, num_keys: int, choice: LaunchConfig) -> Tensor:
    """Launch the kernel: fill `out`, and return the lse (b, h, lq) in float32."""
    b, h, lq, d = out.shape
    lse = torch.empty(b, h, lq, dtype=torch.float32, device=out.device)
    runtime.run(
        packed_kernel,
        (triton.cdiv(lq, choice.block_m) * b * h,),
        *(*x.q, *x.k, *x.v, lse if x.given_back is None else x.given_back, out, lse),
        *(scale / math.log(2), h, lq, num_keys, out.stride()),
        HEAD_DIM=d,
        BLOCK_M=choice.block_m,
        SMOOTH_Q=x.given_back is not None,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return lse


def served(q: Tensor, k: Tensor, mask: Tensor | None, trains: bool) -> LaunchConfig | None:
    """The launch table's choice for these tensors on their GPU; None: the simulation serves them."""
    return None if why_not(q, k, mask, trains) else chosen(ROW, q.shape[-1])[runtime.architecture(q.device)]


def why_not(q: Tensor, k: Tensor, mask: Tensor | None, trains: bool) -> str | None:
    """Why the simulation serves these tensors on their GPU; None: it does not."""
    arch, d = runtime.architecture(q.device), q.shape[-1]
    if arch not in LAUNCH[ROW]:
        return f"sm_{arch} has no FP4 matrix units"
    if d != padded_head_dim(d) or d not in LAUNCH[ROW][arch]:
        return f"heads of {d} have no launch choice there"
    if mask is not None:
        return "there is a mask"
    if trains:
        return "a gradient is wanted"
    if q.numel() == 0 or k.shape[2] == 0:
        return "there is nothing to compute"
    return obstacle(q.device, d)


@cache
def obstacle(device: torch.device, head_dim: int) -> str | None:
    """Why FP4 instructions are not used on a device, None if they give what the simulation gives there."""
    from diffusion_opt.kernels.attention.fp4.operator import prepare  # the operator imports this module when it runs

    generator = torch.Generator(device).manual_seed(0)
    lengths = (PROBED_QUERIES, PROBED_KEYS, PROBED_KEYS)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=generator, device=device).bfloat16() for n in lengths)
    choice = chosen(ROW, head_dim)[runtime.architecture(device)]
    out, expected = torch.empty_like(q), torch.empty_like(q)
    try:
        lse = forward(pack(q, k, v, "qk"), head_dim**-0.5, out, PROBED_KEYS, choice)
    except (RuntimeError, triton.TritonError) as error:
        return f"they do not run here: {str(error).strip().splitlines()[0]}"
    lse_expected = simulation.forward(prepare(q, k, v, "qk"), None, head_dim**-0.5, expected, None)
    for what, got, wanted in (("output", out, expected), ("lse", lse, lse_expected)):
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not error <= 1e-2:
            return f"the {what} differs from the simulation's by {error:.1e} of the largest number"
    return None
