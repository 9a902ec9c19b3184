"""Launches of FP4 attention, forward and backward, as a training step on smoothed q and k makes them."""

from typing import Any

import torch

from diffusion_opt.kernels.attention.fp4.backward import keys_kernel, queries_kernel
from diffusion_opt.kernels.attention.fp4.blackwell import ROW, packed_kernel
from diffusion_opt.kernels.attention.fp4.forward import fp4_forward_kernel, shape_constants
from diffusion_opt.kernels.gate.case import FLOAT_UNITS, NAN_STAYS, TRITON_TYPES, CompileCase, aligned, sampled, typed
from diffusion_opt.kernels.launch import LAUNCH, chosen, row_of

CASES = (  # (type, head dimension, mask)
    (torch.bfloat16, 64, "none"),
    (torch.bfloat16, 128, "none"),
    (torch.bfloat16, 128, "bias"),
    (torch.float32, 64, "none"),
)


def fp4_case(
    name: str, kernel: Any, flops_per_dim: int, dtype: torch.dtype, head_dim: int, kind: str, **own: bool
) -> CompileCase:
    """An FP4 kernel; `own` are its own constants."""
    pointer = f"*{TRITON_TYPES[dtype]}"
    given = {**shape_constants(head_dim, kind, True, dtype), **own}
    types = {"MASK": {"none": pointer, "bias": "*fp32"}[kind], "scale": "fp32", "sigma": "fp32"}
    pointers = ("Q_SCALES", "K_SCALES", "V_SCALES", "Q_MEAN", "GIVEN_BACK", "OUT_HP", "LSE", "LSE2", "DELTA")
    types |= dict.fromkeys(pointers, "*fp32")
    types |= {"mask_strides": ("i32",) * 4} if kind == "none" else {}
    mask = "" if kind == "none" else f" {kind} mask"
    everywhere = (dtype, head_dim, kind) == (torch.bfloat16, 128, "none")
    signature = typed(kernel, types, pointer, (*given, "BLOCK_M"))
    return CompileCase(
        name=f"{name.replace('_', ' ')} {TRITON_TYPES[dtype]} d{head_dim}{mask}",
        kernel=kernel,
        signature=signature,
        constexprs=given,
        divisible=aligned(signature, ("num_heads",)),
        launch=sampled(chosen(row_of(name, dtype, kind != "none"), head_dim), everywhere),
        opcodes={} if dtype == torch.float32 else FLOAT_UNITS,
        loop_flops={TRITON_TYPES[dtype]: flops_per_dim * head_dim},
        loop_exps=1,
        tiles=("BLOCK_M",),
        ptx=NAN_STAYS if kernel is not queries_kernel else (),
    )


def packed_case(head_dim: int) -> CompileCase:
    """The forward kernel on FP4 matrix units, smoothed q."""
    types = dict.fromkeys(("Q", "K", "V"), "*u8") | dict.fromkeys(("Q_SCALES", "K_SCALES", "V_SCALES"), "*fp8e4nv")
    types |= dict.fromkeys(("Q_UNITS", "K_UNITS", "V_UNITS", "GIVEN_BACK", "LSE"), "*fp32") | {"scale": "fp32"}
    given = {"HEAD_DIM": head_dim, "SMOOTH_Q": True}
    signature = typed(packed_kernel, types, "*bf16", (*given, "BLOCK_M"))
    return CompileCase(
        name=f"fp4 forward packed d{head_dim}",
        kernel=packed_kernel,
        signature=signature,
        constexprs=given,
        divisible=aligned(signature, ("num_heads",)),
        launch={arch: choices[head_dim] for arch, choices in LAUNCH[ROW].items()},
        opcodes={100: ("UTCOMMA",), 120: ("OMMA",)},
        tiles=("BLOCK_M",),
        ptx=NAN_STAYS,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The three kernels; the forward one as used in training."""
    forward = [fp4_case("fp4_forward", fp4_forward_kernel, 6, *case, FOR_TRAINING=True) for case in CASES]
    kernels = (("fp4_keys", keys_kernel, 8), ("fp4_queries", queries_kernel, 6))
    packed = [packed_case(head_dim) for head_dim in (64, 128)]
    return (*forward, *packed, *(fp4_case(*kernel, *case) for kernel in kernels for case in CASES))
