"""Launches of 8-bit linear layers, and of the quantizer of their rows, as the gate compiles them."""

import torch

from diffusion_opt.kernels.gate.case import FP8_UNITS, INTEGER_UNITS, NAN_STAYS, CompileCase, aligned, sampled, typed
from diffusion_opt.kernels.gemm.kernel import BLOCK_K, GROUP, linear_kernel, product_launch, quantize_rows_kernel
from diffusion_opt.kernels.gemm.oracle import TOPS
from diffusion_opt.kernels.launch import GEMM_FP8, GEMM_INT8, LaunchConfig

TYPES = {
    "int8": (torch.int8, "*i8", GEMM_INT8, INTEGER_UNITS),
    "fp8": (torch.float8_e4m3fn, "*fp8e4nv", GEMM_FP8, FP8_UNITS),
}
COLUMNS = 4096


def linear_case(kind: str, what: str, activation: str, gated: bool) -> CompileCase:
    """A product with its epilogue, bfloat16 out."""
    dtype, pointer, table, opcodes = TYPES[kind]
    fixed = {"BLOCK_K": BLOCK_K, "GROUP": GROUP, "ACTIVATION": activation, "INTEGER": dtype == torch.int8}
    fixed |= {"HAS_BIAS": True, "HAS_GATE": gated, "HAS_RESIDUAL": gated, "EVEN_K": True}
    types = {"X": pointer, "W": pointer, "X_SCALES": "*fp32", "W_SCALES": "*fp32"}
    signature = typed(linear_kernel, types, "*bf16", (*fixed, "BLOCK_M", "BLOCK_N"))
    return CompileCase(
        name=f"linear {kind}{what}",
        kernel=linear_kernel,
        signature=signature,
        constexprs=fixed,
        divisible=aligned(signature, ("length",)),
        launch=sampled({arch: product_launch(dtype, activation, arch, gated) for arch in table}, what == ""),
        opcodes=opcodes,
        loop_flops={kind: 2 * BLOCK_K * (2 if activation == "swiglu" else 1)},
    )


def rows_case(kind: str, oldest: int) -> CompileCase:
    """Rows of bfloat16 to codes."""
    dtype, pointer, table, _ = TYPES[kind]
    types = {"X": "*bf16", "VALUES": pointer, "SCALES": "*fp32"}
    given = {"TOP": TOPS[dtype], "BLOCK": COLUMNS}
    choice = LaunchConfig(1, COLUMNS, COLUMNS // 512, 1)
    signature = typed(quantize_rows_kernel, types, "*bf16", given)
    return CompileCase(
        name=f"quantize rows {kind} c{COLUMNS}",
        kernel=quantize_rows_kernel,
        signature=signature,
        constexprs=given,
        divisible=aligned(signature, ()),
        launch=sampled({arch: choice for arch in table if arch >= oldest}, everywhere=False),
        tiles=(),
        ptx=NAN_STAYS,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """Products in int8 and e4m3: plain, with SwiGLU, and with gate and residual; and their quantizers."""
    variants = (("", "none", False), (" swiglu", "swiglu", False), (" gated", "none", True))
    products = [linear_case(kind, *variant) for kind in TYPES for variant in variants]
    return (*products, rows_case("int8", 80), rows_case("fp8", 89))
