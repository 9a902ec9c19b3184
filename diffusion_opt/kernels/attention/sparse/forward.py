"""Attention over listed tiles, forward: the kernel behind `block_sparse.py`.

A program owns one block of queries and walks the list of key blocks it attends to (`BlockMask`), with the running
softmax of dense attention:

    for j in list of the row:   peak, norm, total = listed_turn(q, k_j, v_j, peak, norm, total)
    out = total / norm,   lse = ln 2 (peak + log2 norm)

How many turns the loop takes is data, read from `counts`. Where the next tile lies is data too; the compiler still
starts to load it while the last one is being computed, for which it must know the index a turn earlier: that, and the
bounds checks of ragged masks, are what sparse tiles cost more than dense ones.
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


@triton.jit
def sparse_forward_kernel(
    Q, K, V, OUT, LSE, INDICES, COUNTS, LENGTHS, scale, num_heads, num_queries, num_keys, list_b, list_h, most,
    q_strides, k_strides, v_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Output and lse of one block of queries; `scale` is sigma log2 e, LSE is contiguous (b, h, lq)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K, V = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h)
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    q = load_rows(head_of(Q, q_strides, b, h), start, rows, dims, q_strides, num_queries, HEAD_DIM, True)
    peak, norm, total = start_softmax(BLOCK_M, PADDED_DIM)
    row = b * list_b + h * list_h + tile
    for i in range(tl.load(COUNTS + row)):
        block = tl.load(INDICES + row * most + i)
        first = block * BLOCK_N
        real = real_keys(LENGTHS, block, num_keys, BLOCK_N, HAS_LENGTHS)
        k = load_rows(K, first, keys, dims, k_strides, first + real, HEAD_DIM, TAIL)
        v = load_rows(V, first, keys, dims, v_strides, first + real, HEAD_DIM, TAIL)
        peak, norm, total = listed_turn(q, k, v, peak, norm, total, real, scale, BLOCK_N, PRECISION, TAIL)
    out, lse = finish_softmax(peak, norm, total)
    tl.store(LSE + head * num_queries + start + rows, lse, mask=start + rows < num_queries)
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel: output with the strides of `q` where it can have them, lse (b, h, lq) in float32."""
    (b, h, lq, d), lk = q.shape, k.shape[2]
    out, lse = torch.empty_like(q), torch.empty(b, h, lq, dtype=torch.float32, device=q.device)
    name = row_of("block_sparse_forward", q.dtype)
    choice = fitted(launch(name, runtime.architecture(q.device), d), mask.block_m, mask.block_n)
    lists = mask.refined(choice.block_m, choice.block_n)
    indices, counts, lengths, *numbers = lists.arguments()
    runtime.run(
        sparse_forward_kernel,
        (triton.cdiv(lq, choice.block_m) * b * h,),
        *(q, k, v, out, lse, indices, counts, lengths, scale / math.log(2), h, lq, lk, *numbers),
        *(q.stride(), k.stride(), v.stride(), out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        PRECISION=precision(q.dtype),
        TAIL=lists.has_gaps(lk),
        HAS_LENGTHS=lists.lengths is not None,
        **choice.tuning(),
    )
    return out, lse
