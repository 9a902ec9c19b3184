"""Dense attention, forward: the scores never leave the chip.

    O = softmax(sigma Q K^T + bias) V,      sigma = 1 / sqrt(d) unless given

One program owns `BLOCK_M` queries and walks over the keys in tiles, keeping three running values per query (Milakov and
Gimelshein 2018, arXiv 1805.02867; Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 1), here in base 2:

    peak' = max(peak, max_j s_j)        s_j = (sigma log2 e) q.k_j + (log2 e) bias_j
    p_j   = 2^(s_j - peak')             one exponential per score; without a bias its argument is one multiply-add
    norm  = 2^(peak - peak') norm  + sum_j p_j
    total = 2^(peak - peak') total + sum_j p_j v_j

and at the end O = total / norm and lse = ln 2 (peak + log2 norm), natural, which the backward pass needs.

The keys are walked in two loops over the same body: whole tiles without any bounds check, then what is left with one.
Lengths and strides are run-time numbers, so no sequence length compiles anew; only head dimension, tiles and the kind
of mask do. A query all of whose keys are masked gives zeros and lse -inf, where softmax alone would give NaN. Against
the Triton tutorial's kernel: any length and head dimension, any strides, masks, empty rows, no autotuning.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import CLOSED_BELOW
from diffusion_opt.kernels.gate.case import CompileCase, sampled
from diffusion_opt.kernels.launch import chosen, launch, padded_head_dim, row_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CLOSED = tl.constexpr(CLOSED_BELOW)
HALF_MIN = tl.constexpr(torch.finfo(torch.float16).min)


@triton.jit
def load_rows(base, start, rows, dims, stride_row, stride_dim, end, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr):
    """Rows start + rows of a matrix as a tile (rows, dims); zeros where the tile reaches past `end` or the head."""
    address = base + tl.cast(start, tl.int64) * stride_row + rows[:, None] * stride_row + dims[None, :] * stride_dim
    inside = (start + rows < end)[:, None]
    if HEAD_DIM == dims.shape[0]:
        tile = tl.load(address, mask=inside, other=0.0) if TAIL else tl.load(address)
    elif TAIL:
        tile = tl.load(address, mask=inside & (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(address, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def masked_scores(scores, MASK, rows, columns, stride_row, stride_column, inside, KIND: tl.constexpr):
    """Scores in base 2 with the mask's tile applied: -inf where it is closed or where `inside` is false."""
    address = MASK + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    if KIND == "bool":
        is_open = tl.load(address, mask=inside, other=0) != 0
        result = tl.where(is_open, scores, -float("inf"))
    else:
        bias = tl.load(address, mask=inside, other=-float("inf")).to(tl.float32)
        LEAST: tl.constexpr = HALF_MIN if MASK.dtype.element_ty == tl.float16 else CLOSED
        result = tl.where(bias <= LEAST, -float("inf"), scores + bias * LOG2_E)
    return result


@triton.jit
def walk_keys(
    q, peak, norm, total, K, V, MASK, scale, first, last, queries, num_queries,
    stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Take keys first to last into the running peak, norm and total; a mask PER_KEY is the same for all queries."""
    dims = tl.arange(0, q.shape[1])
    keys = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        k = load_rows(K, start, keys, dims, stride_kl, stride_kd, last, HEAD_DIM, TAIL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if KIND == "none":
            if TAIL:
                scores = tl.where((start + keys < last)[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)  # scale > 0, so the largest stays the largest
            weights = tl.exp2(scores * scale - new_peak[:, None])
            correction = tl.exp2(peak - new_peak)
        else:
            inside = (start + keys < last)[None, :]
            rows = tl.zeros([1], tl.int32) if PER_KEY else queries
            if not PER_KEY:
                inside = inside & (queries < num_queries)[:, None]
            scores = masked_scores(scores * scale, MASK, rows, start + keys, stride_mq, stride_mk, inside, KIND)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            origin = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing open so far: all weights are 0
            weights = tl.exp2(scores - origin[:, None])
            correction = tl.exp2(peak - origin)
        norm = norm * correction + tl.sum(weights, 1)
        v = load_rows(V, start, keys, dims, stride_vl, stride_vd, last, HEAD_DIM, TAIL)
        total = tl.dot(weights.to(v.dtype), v, total * correction[:, None], input_precision=PRECISION)
        peak = new_peak
    return peak, norm, total


@triton.jit
def forward_kernel(
    Q, K, V, MASK, OUT, LSE, scale, num_heads, num_queries, num_keys,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ob, stride_oh, stride_ol, stride_od,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries of one head; `scale` is sigma log2 e, LSE is contiguous (b, h, lq)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    start = tl.program_id(0) % num_tiles * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)  # of all heads of the batch
    b, h = head // num_heads, head % num_heads
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    MASK += b * stride_mb + h * stride_mh
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    q = load_rows(
        Q + b * stride_qb + h * stride_qh, start, rows, dims, stride_ql, stride_qd, num_queries, HEAD_DIM, True
    )
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    peak, norm, total = walk_keys(
        q, peak, norm, total, K, V, MASK, scale, 0, whole, start + rows, num_queries,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk, HEAD_DIM, BLOCK_N, KIND, PER_KEY,
        PRECISION, False,
    )  # fmt: skip
    peak, norm, total = walk_keys(
        q, peak, norm, total, K, V, MASK, scale, whole, num_keys, start + rows, num_queries,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_mq, stride_mk, HEAD_DIM, BLOCK_N, KIND, PER_KEY,
        PRECISION, True,
    )  # fmt: skip
    inside = start + rows < num_queries
    tl.store(LSE + head * num_queries + start + rows, (peak + tl.log2(norm)) * LN_2, mask=inside)
    out = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    address = OUT + b * stride_ob + h * stride_oh + tl.cast(start, tl.int64) * stride_ol
    address += rows[:, None] * stride_ol + dims[None, :] * stride_od
    tl.store(address, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :])


def kernel_mask(mask: Tensor | None, q: Tensor) -> tuple[str, Tensor, tuple[int, int, int, int]]:
    """Kind, tensor and strides of a mask expanded to (b, h, lq, lk); booleans as bytes; `q` stands in for none."""
    if mask is None:
        return "none", q, (0, 0, 0, 0)
    if mask.dtype == torch.bool:
        return "bool", mask.view(torch.uint8), mask.stride()
    return "bias", mask, mask.stride()


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply: float32 as three products of TF32, which keeps float32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


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
        *(*q.stride(), *k.stride(), *v.stride(), *mask_strides, *out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        KIND=kind,
        PER_KEY=mask_strides[2] == 0,
        PRECISION=precision(q.dtype),
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return out, lse


TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CASES = (  # what the ahead-of-time gate compiles: (type, head dimension, mask)
    (torch.bfloat16, 64, "none"),
    (torch.bfloat16, 128, "none"),
    (torch.bfloat16, 256, "none"),
    (torch.float16, 72, "none"),
    (torch.bfloat16, 128, "bool"),
    (torch.bfloat16, 128, "bias"),
    (torch.bfloat16, 128, "bias per key"),
    (torch.float32, 64, "none"),
    (torch.float32, 128, "none"),
)
OPCODES = {  # of the matrix units; those of a group of warps (HGMMA, UTCHMMA) take 64 rows or more
    80: ("HMMA",),
    89: ("HMMA",),
    90: ("HGMMA",),
    100: ("UTCHMMA",),
    120: ("HMMA",),
}
ROWS_OF_A_GROUP = 64


def signature(kernel: Any, dtype: torch.dtype, kind: str) -> dict[str, str]:
    """The types of a dense kernel's arguments as a launch on contiguous heads has them."""
    pointer = f"*{TRITON_TYPES[dtype]}"
    types = {"MASK": {"none": pointer, "bool": "*u8"}.get(kind, "*fp32"), "scale": "fp32", "sigma": "fp32"}
    types |= dict.fromkeys(("LSE", "LSE2", "DELTA", "GRAD_LSE"), "*fp32")
    types |= dict.fromkeys(("Q", "K", "V", "OUT", "GRAD_OUT", "GRAD_Q", "GRAD_K", "GRAD_V"), pointer)
    types |= dict.fromkeys(
        ("HEAD_DIM", "PADDED_DIM", "BLOCK_M", "BLOCK_N", "KIND", "PER_KEY", "PRECISION"), "constexpr"
    )
    types |= dict.fromkeys(("stride_qd", "stride_kd", "stride_vd", "stride_od", "stride_gd"), "constexpr")
    if kind != "none":
        types["stride_mk"] = "constexpr"
    return {name: types.get(name, "i32") for name in kernel.arg_names}


def dense_case(name: str, kernel: Any, dtype: torch.dtype, head_dim: int, kind: str, flops_per_dim: int) -> CompileCase:
    """A dense kernel (`flops_per_dim` per score and number of a head) as `CASES` lists it."""
    types = signature(kernel, dtype, kind)
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim), "PRECISION": precision(dtype)}
    constants |= {"KIND": kind.partition(" ")[0], "PER_KEY": kind in ("none", "bias per key")}
    ones = [argument for argument in types if argument.startswith("stride") and types[argument] == "constexpr"]
    aligned = [argument for argument, type_ in types.items() if type_ == "i32" and argument != "num_heads"]
    aligned += [argument for argument, type_ in types.items() if type_.startswith("*")]
    mask = "" if kind == "none" else f" {kind} mask"
    everywhere = dtype == torch.bfloat16 and head_dim in (64, 128) and kind == "none"
    choices = sampled(chosen(row_of(name, dtype, kind != "none"), head_dim), everywhere)
    owned = {arch: choice.block_n if name == "dense_keys" else choice.block_m for arch, choice in choices.items()}
    flops = flops_per_dim * padded_head_dim(head_dim)
    return CompileCase(
        name=f"{name.replace('_', ' ')} {TRITON_TYPES[dtype]} d{head_dim}{mask}",
        kernel=kernel,
        signature=types,
        constexprs={**constants, **dict.fromkeys(ones, 1)},
        divisible=tuple(aligned),
        launch=choices,
        opcodes={arch: OPCODES[arch] if owned[arch] >= ROWS_OF_A_GROUP else ("HMMA",) for arch in choices},
        loop_flops={"tf32": 3 * flops} if dtype == torch.float32 else {TRITON_TYPES[dtype]: flops},
        loop_exps=1,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The forward kernel for the ahead-of-time gate."""
    return tuple(dense_case("dense_forward", forward_kernel, *case, flops_per_dim=4) for case in CASES)
