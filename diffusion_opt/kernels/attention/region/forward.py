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

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.softmax_tiles import (
    finish_softmax,
    fitted,
    listed_turn,
    real_keys,
    start_softmax,
)
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of
from diffusion_opt.kernels.tiles import head_of, load_rows, precision, program_of_head, store_rows

WRITTEN_ROWS = 16  # of a program of the copy; limited by memory, so the number hardly matters


@triton.jit
def write_rows_kernel(
    K_CACHE, V_CACHE, K, V, INDEX, num_heads, num_rows, k_cache_strides, v_cache_strides, k_strides, v_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of k and of v of one head to their tokens."""
    tile, _, b, h = program_of_head(num_rows, num_heads, BLOCK_M)
    start, rows, dims = tile * BLOCK_M, tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    token = tl.load(INDEX + b * num_rows + start + rows, mask=start + rows < num_rows, other=-1).to(tl.int64)[:, None]
    real, column = (token >= 0) & (dims < HEAD_DIM)[None, :], dims[None, :]
    k = load_rows(head_of(K, k_strides, b, h), start, rows, dims, k_strides, num_rows, HEAD_DIM, True)
    v = load_rows(head_of(V, v_strides, b, h), start, rows, dims, v_strides, num_rows, HEAD_DIM, True)
    k_place = head_of(K_CACHE, k_cache_strides, b, h) + token * k_cache_strides[2] + column * k_cache_strides[3]
    v_place = head_of(V_CACHE, v_cache_strides, b, h) + token * v_cache_strides[2] + column * v_cache_strides[3]
    tl.store(k_place, k, mask=real)
    tl.store(v_place, v, mask=real)


@triton.jit
def region_kernel(
    Q, K, V, OUT, LSE, INDEX, INDICES, COUNTS, LENGTHS,
    scale, num_heads, num_queries, num_keys, list_b, list_h, most,
    q_strides, k_strides, v_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, LISTED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M active queries of one head; `scale` is sigma log2 e, INDEX (b, n), LSE (b, h, n)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K, V = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    active = tl.load(INDEX + b * num_queries + start + rows, mask=start + rows < num_queries, other=-1) >= 0
    q = load_rows(head_of(Q, q_strides, b, h), start, rows, dims, q_strides, num_queries, HEAD_DIM, True)
    peak, norm, total = start_softmax(BLOCK_M, PADDED_DIM)
    row = b * list_b + h * list_h + tile
    turns = tl.load(COUNTS + row) if LISTED else tl.cdiv(num_keys, BLOCK_N)
    turns = tl.where(tl.max(active.to(tl.int32), 0) > 0, turns, 0)
    for i in range(turns):
        block = tl.load(INDICES + row * most + i) if LISTED else i
        first = block * BLOCK_N
        real = real_keys(LENGTHS, block, num_keys, BLOCK_N, HAS_LENGTHS)
        k = load_rows(K, first, keys, dims, k_strides, first + real, HEAD_DIM, TAIL)
        v = load_rows(V, first, keys, dims, v_strides, first + real, HEAD_DIM, TAIL)
        peak, norm, total = listed_turn(q, k, v, peak, norm, total, real, scale, BLOCK_N, PRECISION, TAIL)
    out, lse = finish_softmax(peak, norm, total)
    tl.store(
        LSE + head * num_queries + start + rows, tl.where(active, lse, -float("inf")), mask=start + rows < num_queries
    )
    out = tl.where(active[:, None], out, 0.0)
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)


def write_rows(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """Launch the copy."""
    b, h, n, d = k.shape
    runtime.run(
        write_rows_kernel,
        (triton.cdiv(n, WRITTEN_ROWS) * b * h,),
        *(k_cache, v_cache, k, v, index.contiguous(), h, n),
        *(k_cache.stride(), v_cache.stride(), k.stride(), v.stride()),
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
        *(q.stride(), k_cache.stride(), v_cache.stride(), out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        PRECISION=precision(q.dtype),
        TAIL=gaps,
        LISTED=mask is not None,
        HAS_LENGTHS=mask is not None and mask.lengths is not None,
        **choice.tuning(),
    )
    return out, lse
