"""The two kernels behind `operator.py`: rows into a cache, and attention of listed queries to the whole cache.

`write_rows_kernel` copies rows of k and v to the tokens of the index, both in one launch: it moves 4 n d numbers per
head, where concatenating or copying a cache moves all of it.

`region_kernel` is dense attention with few queries, or block-sparse attention where there is a mask: each program owns
a tile of active queries and walks all key tiles, or its list. Its queries lie together (the layers before computed only
them), so the index matters to it only as the end of a list: a tile of queries that do not exist is not computed at all.
With few queries there are few programs; heads and batch make up for it from about a hundred tiles on, and below that a
GPU is not full.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense.forward import load_rows, precision
from diffusion_opt.kernels.attention.softmax_tiles import finish_softmax, fitted, real_keys, softmax_step, store_rows
from diffusion_opt.kernels.attention.sparse.forward import sparse_case
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of

WRITTEN_ROWS = 16  # of a program of the copy; limited by memory, so the number hardly matters


@triton.jit
def write_rows_kernel(
    K_CACHE, V_CACHE, K, V, INDEX, num_heads, num_rows,
    stride_ab, stride_ah, stride_al, stride_ad, stride_cb, stride_ch, stride_cl, stride_cd,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of k and of v of one head to their tokens."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    rows = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    dims = tl.arange(0, PADDED_DIM)
    token = tl.load(INDEX + b * num_rows + rows, mask=rows < num_rows, other=-1).to(tl.int64)[:, None]
    real = (token >= 0) & (dims < HEAD_DIM)[None, :]
    source, column = rows.to(tl.int64)[:, None], dims[None, :]
    k = tl.load(K + b * stride_kb + h * stride_kh + source * stride_kl + column * stride_kd, mask=real, other=0.0)
    v = tl.load(V + b * stride_vb + h * stride_vh + source * stride_vl + column * stride_vd, mask=real, other=0.0)
    tl.store(K_CACHE + b * stride_ab + h * stride_ah + token * stride_al + column * stride_ad, k, mask=real)
    tl.store(V_CACHE + b * stride_cb + h * stride_ch + token * stride_cl + column * stride_cd, v, mask=real)


@triton.jit
def region_kernel(
    Q, K, V, OUT, LSE, INDEX, INDICES, COUNTS, LENGTHS,
    scale, num_heads, num_queries, num_keys, list_b, list_h, most,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_ob, stride_oh, stride_ol, stride_od,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, LISTED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M active queries of one head; `scale` is sigma log2 e, INDEX (b, n), LSE (b, h, n)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    start = tile * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    active = tl.load(INDEX + b * num_queries + start + rows, mask=start + rows < num_queries, other=-1) >= 0
    q = load_rows(
        Q + b * stride_qb + h * stride_qh, start, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, True
    )
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row = b * list_b + h * list_h + tile
    turns = tl.load(COUNTS + row) if LISTED else tl.cdiv(num_keys, BLOCK_N)
    turns = tl.where(tl.max(active.to(tl.int32), 0) > 0, turns, 0)
    for i in range(turns):
        block = tl.load(INDICES + row * most + i) if LISTED else i
        first = block * BLOCK_N
        real = real_keys(LENGTHS, block, num_keys, BLOCK_N, HAS_LENGTHS)
        k = load_rows(K, first, keys, dims, stride_kl, stride_kd, first + real, HEAD_DIM, TAIL)
        v = load_rows(V, first, keys, dims, stride_vl, stride_vd, first + real, HEAD_DIM, TAIL)
        peak, norm, total = softmax_step(q, k, v, peak, norm, total, real, scale, BLOCK_N, PRECISION, TAIL)
    out, lse = finish_softmax(peak, norm, total)
    tl.store(
        LSE + head * num_queries + start + rows, tl.where(active, lse, -float("inf")), mask=start + rows < num_queries
    )
    out = tl.where(active[:, None], out, 0.0)
    store_rows(OUT + b * stride_ob + h * stride_oh, start, rows, dims, stride_ol, stride_od, num_queries, out, HEAD_DIM)


def write_rows(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """Launch the copy."""
    b, h, n, d = k.shape
    runtime.run(
        write_rows_kernel,
        (triton.cdiv(n, WRITTEN_ROWS) * b * h,),
        *(k_cache, v_cache, k, v, index.contiguous(), h, n),
        *(*k_cache.stride(), *v_cache.stride(), *k.stride(), *v.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=WRITTEN_ROWS,
    )


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor, mask: BlockMask | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the attention: output with the strides of `q` where it can have them, lse (b, h, n) in float32."""
    (b, h, n, d), length = q.shape, k_cache.shape[2]
    out, lse = torch.empty_like(q), torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    index = index.contiguous()
    choice = launch(row_of("region", q.dtype), runtime.architecture(q.device), d)
    lists, gaps = (index, index, index, 0, 0, 0), length % choice.block_n != 0  # the index stands in for lists
    if mask is not None:
        choice = fitted(choice, mask.block_m, mask.block_n)
        mask = mask.refined(choice.block_m, choice.block_n)
        lists, gaps = mask.arguments(), mask.has_gaps(length)
    runtime.run(
        region_kernel,
        (triton.cdiv(n, choice.block_m) * b * h,),
        *(q, k_cache, v_cache, out, lse, index, *lists[:3], scale / math.log(2), h, n, length, *lists[3:]),
        *(*q.stride(), *k_cache.stride(), *v_cache.stride(), *out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        PRECISION=precision(q.dtype),
        TAIL=gaps,
        LISTED=mask is not None,
        HAS_LENGTHS=mask is not None and mask.lengths is not None,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return out, lse


def compile_cases() -> tuple[CompileCase, ...]:
    """Attention to a whole cache, and by a mask, for the ahead-of-time gate; the copy has no matrix work."""
    cases = ((torch.bfloat16, 64, 128, False), (torch.bfloat16, 128, 128, False), (torch.float32, 64, 64, True))
    whole = [sparse_case("region", region_kernel, *case, 4, LISTED=False) for case in cases]
    whole = [replace(case, name=case.name.partition(" blocks")[0]) for case in whole]
    return (*whole, sparse_case("region", region_kernel, torch.bfloat16, 128, 64, True, 4, LISTED=True))
