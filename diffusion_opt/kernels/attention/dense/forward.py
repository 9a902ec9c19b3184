"""Dense attention, forward: the scores never leave the chip.

    O = softmax(sigma Q K^T + bias) V,      sigma = 1 / sqrt(d) unless given

One program owns `BLOCK_M` queries and walks over the keys in tiles, keeping three running values per query (Milakov and
Gimelshein 2018, arXiv 1805.02867; Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 1), here in base 2, as
`softmax_tiles.py` writes them down, and at the end O = total / norm and lse = ln 2 (peak + log2 norm), natural, which
the backward pass needs. Without a bias the argument of a score's exponential is one multiply-add.

Whole tiles of keys need no bounds check, and what is left over does. The launch table says in which FORM, because
compilers differ:

    loop      a second loop over the same body, of one turn or none                        sm_80, 89, 120
    peeled    the body once more under an `if`: behind a second loop ptxas cannot follow the asynchronous matrix
              instructions of the first, says so (message C7515), and waits for each        sm_90, 100; spills on sm_120
    inside    one loop that checks every tile: fewest registers                             where the others spill

Lengths and strides are run-time numbers, so no sequence length compiles anew; only head dimension, tiles and the kind
of mask do. A query all of whose keys are masked gives zeros and lse -inf, where softmax alone would give NaN. Against
the Triton tutorial's kernel: any length and head dimension, any strides, masks, empty rows, no autotuning.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.softmax_tiles import (
    finish_softmax,
    kernel_mask,
    masked_scores,
    softmax_turn,
    start_softmax,
)
from diffusion_opt.kernels.launch import launch, padded_head_dim, row_of
from diffusion_opt.kernels.tiles import head_of, load_rows, precision, program_of_head, store_rows


@triton.jit
def attend_tile(
    q, peak, norm, total, K, V, MASK, scale, start, last, queries, num_queries, k_strides, v_strides, mask_strides,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """peak, norm and total after the tile of keys from `start` on, before `last`; PER_KEY: a mask for all queries."""
    dims, keys = tl.arange(0, q.shape[1]), tl.arange(0, BLOCK_N)
    k = load_rows(K, start, keys, dims, k_strides, last, HEAD_DIM, TAIL)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if KIND == "none":
        if TAIL:
            scores = tl.where((start + keys < last)[None, :], scores, -float("inf"))
        weights, correction, peak, norm = softmax_turn(scores, scale, peak, norm, False, False)
    else:
        inside = (start + keys < last)[None, :]
        rows = tl.zeros([1], tl.int32) if PER_KEY else queries
        if not PER_KEY:
            inside = inside & (queries < num_queries)[:, None]
        scores = masked_scores(
            scores * scale, MASK, rows, start + keys, mask_strides[2], mask_strides[3], inside, KIND
        )  # fmt: skip
        weights, correction, peak, norm = softmax_turn(scores, 1.0, peak, norm, False, True)
    v = load_rows(V, start, keys, dims, v_strides, last, HEAD_DIM, TAIL)
    total = tl.dot(weights.to(v.dtype), v, total * correction[:, None], input_precision=PRECISION)
    return peak, norm, total


@triton.jit
def forward_kernel(
    Q, K, V, MASK, OUT, LSE, scale, num_heads, num_queries, num_keys,
    q_strides, k_strides, v_strides, mask_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries of one head; `scale` is sigma log2 e, LSE is contiguous (b, h, lq)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    K, V, MASK = head_of(K, k_strides, b, h), head_of(V, v_strides, b, h), head_of(MASK, mask_strides, b, h)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    q = load_rows(head_of(Q, q_strides, b, h), start, rows, dims, q_strides, num_queries, HEAD_DIM, True)
    peak, norm, total = start_softmax(BLOCK_M, PADDED_DIM)
    whole = 0 if FORM == "inside" else num_keys // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        peak, norm, total = attend_tile(
            q, peak, norm, total, K, V, MASK, scale, first, whole, start + rows, num_queries,
            k_strides, v_strides, mask_strides, HEAD_DIM, BLOCK_N, KIND, PER_KEY, PRECISION, False,
        )  # fmt: skip
    if FORM == "peeled":
        if whole < num_keys:
            peak, norm, total = attend_tile(
                q, peak, norm, total, K, V, MASK, scale, whole, num_keys, start + rows, num_queries,
                k_strides, v_strides, mask_strides, HEAD_DIM, BLOCK_N, KIND, PER_KEY, PRECISION, True,
            )  # fmt: skip
    else:
        for first in range(whole, num_keys, BLOCK_N):
            peak, norm, total = attend_tile(
                q, peak, norm, total, K, V, MASK, scale, first, num_keys, start + rows, num_queries,
                k_strides, v_strides, mask_strides, HEAD_DIM, BLOCK_N, KIND, PER_KEY, PRECISION, True,
            )  # fmt: skip
    out, lse = finish_softmax(peak, norm, total)
    tl.store(LSE + head * num_queries + start + rows, lse, mask=start + rows < num_queries)
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel: output with the strides of `q` where it can have them, lse (b, h, lq) in float32."""
    b, h, lq, d = q.shape
    out, lse = torch.empty_like(q), torch.empty(b, h, lq, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    kind, mask, mask_strides = kernel_mask(mask, q)
    choice = launch(row_of("dense_forward", q.dtype, kind != "none"), runtime.architecture(q.device), d)
    runtime.run(
        forward_kernel,
        (triton.cdiv(lq, choice.block_m) * b * h,),
        *(q, k, v, mask, out, lse, scale / math.log(2), h, lq, k.shape[2]),
        *(q.stride(), k.stride(), v.stride(), mask_strides, out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        KIND=kind,
        PER_KEY=mask_strides[2] == 0,
        PRECISION=precision(q.dtype),
        FORM=choice.form,
        **choice.tuning(),
    )
    return out, lse
