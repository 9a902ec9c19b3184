"""Attention over listed tiles, forward: the kernel behind `block_sparse.py`.

A program owns one block of queries and walks the list of key blocks it attends to (`BlockMask`), with the running
softmax of dense attention:

    for j in list of the row:   peak, norm, total = softmax_step(q, k_j, v_j, peak, norm, total)
    out = total / norm,   lse = ln 2 (peak + log2 norm)

How many turns the loop takes is data, read from `counts`. Where the next tile lies is data too; the compiler still
starts to load it while the last one is being computed, for which it must know the index a turn earlier: that, and the
bounds checks of ragged masks, are what sparse tiles cost more than dense ones.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense.forward import (
    OPCODES,
    ROWS_OF_A_GROUP,
    TRITON_TYPES,
    load_rows,
    precision,
)
from diffusion_opt.kernels.attention.softmax_tiles import finish_softmax, fitted, real_keys, softmax_step, store_rows
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.gate.case import CompileCase, sampled
from diffusion_opt.kernels.launch import chosen, launch, padded_head_dim, row_of

POINTERS = dict.fromkeys(("LSE", "LSE2", "DELTA"), "*fp32") | dict.fromkeys(
    ("INDEX", "INDICES", "COUNTS", "LENGTHS"), "*i32"
)


@triton.jit
def sparse_forward_kernel(
    Q, K, V, OUT, LSE, INDICES, COUNTS, LENGTHS, scale, num_heads, num_queries, num_keys, list_b, list_h, most,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_ob, stride_oh, stride_ol, stride_od,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Output and lse of one block of queries; `scale` is sigma log2 e, LSE is contiguous (b, h, lq)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    start = tile * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)  # of all heads of the batch
    b, h = head // num_heads, head % num_heads
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    q = load_rows(
        Q + b * stride_qb + h * stride_qh, start, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, True
    )
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row = b * list_b + h * list_h + tile
    for i in range(tl.load(COUNTS + row)):
        block = tl.load(INDICES + row * most + i)
        first = block * BLOCK_N
        real = real_keys(LENGTHS, block, num_keys, BLOCK_N, HAS_LENGTHS)
        k = load_rows(K, first, keys, dims, stride_kl, stride_kd, first + real, HEAD_DIM, TAIL)
        v = load_rows(V, first, keys, dims, stride_vl, stride_vd, first + real, HEAD_DIM, TAIL)
        peak, norm, total = softmax_step(q, k, v, peak, norm, total, real, scale, BLOCK_N, PRECISION, TAIL)
    out, lse = finish_softmax(peak, norm, total)
    tl.store(LSE + head * num_queries + start + rows, lse, mask=start + rows < num_queries)
    OUT += b * stride_ob + h * stride_oh
    store_rows(OUT, start, rows, dims, stride_ol, stride_od, num_queries, out, HEAD_DIM)


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
        *(*q.stride(), *k.stride(), *v.stride(), *out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        PRECISION=precision(q.dtype),
        TAIL=lists.has_gaps(lk),
        HAS_LENGTHS=lists.lengths is not None,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return out, lse


CASES = (  # what the ahead-of-time gate compiles: (type, head dimension, side of the mask's blocks, whether ragged)
    (torch.bfloat16, 64, 128, False),
    (torch.bfloat16, 128, 128, False),
    (torch.bfloat16, 128, 64, True),
    (torch.bfloat16, 256, 64, True),
    (torch.float32, 64, 64, True),
)


def sparse_case(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    head_dim: int,
    block: int,
    ragged: bool,
    flops_per_dim: int,
    **constants: object,
) -> CompileCase:
    """A kernel that walks lists (`flops_per_dim` per score and number of a head); `ragged` tiles are bounded."""
    constants |= {end: ragged for end in ("TAIL", "QUERY_TAIL", "HAS_LENGTHS") if end in kernel.arg_names}
    fixed = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim), "PRECISION": precision(dtype), **constants}
    fixed |= {argument: 1 for argument in kernel.arg_names if argument.startswith("stride") and argument.endswith("d")}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys((*fixed, "BLOCK_M", "BLOCK_N"), "constexpr")
    for argument in types.keys() - fixed.keys():
        if argument.isupper() and not argument.startswith("BLOCK"):
            types[argument] = POINTERS.get(argument, f"*{TRITON_TYPES[dtype]}")
    types |= {argument: "fp32" for argument in ("scale", "sigma") if argument in types}
    unaligned = ("num_heads", "list_b", "list_h", "most", "scale", "sigma")
    by_keys = name == "block_sparse_keys"
    everywhere = (dtype, head_dim, block) == (torch.bfloat16, 128, 128)
    choices = sampled(chosen(row_of(name, dtype), head_dim), everywhere)
    choices = {arch: fitted(choice, block, block, by_keys) for arch, choice in choices.items()}
    owned = {arch: choice.block_n if by_keys else choice.block_m for arch, choice in choices.items()}
    flops = flops_per_dim * padded_head_dim(head_dim)
    blocks = f"blocks of {block}{' ragged' if ragged else ''}"
    return CompileCase(
        name=f"{name.replace('_', ' ')} {TRITON_TYPES[dtype]} d{head_dim} {blocks}",
        kernel=kernel,
        signature=types,
        constexprs=fixed,
        divisible=tuple(n for n, kind in types.items() if kind != "constexpr" and n not in unaligned),
        launch=choices,
        opcodes={arch: OPCODES[arch] if owned[arch] >= ROWS_OF_A_GROUP else ("HMMA",) for arch in choices},
        loop_flops={"tf32": 3 * flops} if dtype == torch.float32 else {TRITON_TYPES[dtype]: flops},
        loop_exps=1,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The forward kernel for the ahead-of-time gate."""
    return tuple(sparse_case("block_sparse_forward", sparse_forward_kernel, *case, 4) for case in CASES)
