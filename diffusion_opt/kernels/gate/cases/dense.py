"""Launches of dense attention, forward and backward, as the gate compiles them."""

from typing import Any

import torch

from diffusion_opt.kernels.attention.dense.backward import keys_kernel, queries_kernel
from diffusion_opt.kernels.attention.dense.forward import forward_kernel
from diffusion_opt.kernels.attention.dense.specialized import ROW, specialized_kernel
from diffusion_opt.kernels.gate.case import FLOAT_UNITS, TRITON_TYPES, CompileCase, aligned, owning, sampled, typed
from diffusion_opt.kernels.launch import chosen, padded_head_dim, row_of
from diffusion_opt.kernels.tiles import precision

CASES = (  # (type, head dimension, mask)
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


def dense_case(name: str, kernel: Any, dtype: torch.dtype, head_dim: int, kind: str, flops_per_dim: int) -> CompileCase:
    """A dense kernel (`flops_per_dim` per score and number of a head) as `CASES` lists it."""
    pointer = f"*{TRITON_TYPES[dtype]}"
    types = {"MASK": {"none": pointer, "bool": "*u8"}.get(kind, "*fp32"), "scale": "fp32", "sigma": "fp32"}
    types |= dict.fromkeys(("LSE", "LSE2", "DELTA"), "*fp32")
    types |= {"mask_strides": ("i32",) * 4} if kind == "none" else {}
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim), "PRECISION": precision(dtype)}
    constants |= {"KIND": kind.partition(" ")[0], "PER_KEY": kind in ("none", "bias per key")}
    everywhere = dtype == torch.bfloat16 and head_dim in (64, 128) and kind == "none"
    choices = sampled(chosen(row_of(name, dtype, kind != "none"), head_dim), everywhere)
    flops = flops_per_dim * padded_head_dim(head_dim)
    mask = "" if kind == "none" else f" {kind} mask"
    signature = typed(kernel, types, pointer, (*constants, "BLOCK_M", "BLOCK_N", "FORM"))
    return CompileCase(
        name=f"{name.replace('_', ' ')} {TRITON_TYPES[dtype]} d{head_dim}{mask}",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        divisible=aligned(signature, ("num_heads",)),
        launch=choices,
        opcodes=owning(choices, FLOAT_UNITS, keys=name == "dense_keys"),
        loop_flops={"tf32": 3 * flops} if dtype == torch.float32 else {TRITON_TYPES[dtype]: flops},
        loop_exps=1,
        tiles=("BLOCK_M", "BLOCK_N", "FORM"),
    )


def specialized_case(head_dim: int) -> CompileCase:
    """The forward kernel with warps of two kinds."""
    fixed = {"HEAD_DIM": head_dim, "PADDED_DIM": head_dim}
    types = {"LSE": "*fp32", "scale": "fp32"}
    signature = typed(specialized_kernel, types, "*bf16", (*fixed, "BLOCK_M", "BLOCK_N"))
    choices = chosen(ROW, head_dim)
    return CompileCase(
        name=f"dense forward specialized bf16 d{head_dim}",
        kernel=specialized_kernel,
        signature=signature,
        constexprs=fixed,
        divisible=aligned(signature, ("num_heads",)),
        launch=choices,
        opcodes=owning(choices, FLOAT_UNITS, keys=False),
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The forward kernel, and the two of the backward pass that multiply matrices."""
    forward = [dense_case("dense_forward", forward_kernel, *case, flops_per_dim=4) for case in CASES]
    kernels = (("dense_keys", keys_kernel, 8), ("dense_queries", queries_kernel, 6))
    cases = [case for case in CASES if case[0] != torch.float16 and case[2] != "bias per key"]  # forward shows these
    special = [specialized_case(head_dim) for head_dim in (64, 128)]
    return (
        *forward,
        *special,
        *(dense_case(name, kernel, *case, flops) for name, kernel, flops in kernels for case in cases),
    )
