"""Launches of attention on 8-bit codes, as the gate compiles them."""

import torch

from diffusion_opt.kernels.attention.eight_bit.forward import constants, eight_bit_kernel, row_of
from diffusion_opt.kernels.gate.case import FLOAT_UNITS, FP8_UNITS, INTEGER_UNITS, CompileCase, aligned, sampled, typed
from diffusion_opt.kernels.launch import chosen

CASES = (  # (codes, head dimension, granularity, values in, mask)
    (torch.int8, 64, "block", "fp16", "none"),
    (torch.int8, 128, "block", "fp16", "none"),
    (torch.int8, 128, "block", "fp16", "bias"),
    (torch.int8, 128, "thread", "fp16_fast", "none"),
    (torch.int8, 64, "block", "fp8", "none"),
    (torch.int8, 128, "block", "fp8", "none"),
    (torch.int8, 128, "thread", "fp8", "none"),
    (torch.int8, 128, "block", "fp8", "bool"),
    (torch.float8_e4m3fn, 64, "block", "fp8", "none"),
    (torch.float8_e4m3fn, 128, "block", "fp8", "none"),
    (torch.float8_e4m3fn, 128, "block", "fp8", "bool"),
)


def eight_bit_case(codes: torch.dtype, head_dim: int, granularity: str, values_in: str, kind: str) -> CompileCase:
    """The kernel on contiguous codes; FP8 values have tokens as neighbors."""
    pointer = "*i8" if codes == torch.int8 else "*fp8e4nv"
    types = {"V": "*fp8e4nv" if values_in == "fp8" else "*fp16", "OUT": "*bf16", "scale": "fp32"}
    types |= {"MASK": {"none": pointer, "bool": "*u8", "bias": "*fp32"}[kind]}
    types |= dict.fromkeys(("Q_SCALES", "K_SCALES", "V_SCALES", "LSE"), "*fp32")
    types |= {"v_strides": ("i32", "i32", "1", "i32")} if values_in == "fp8" else {}
    types |= {"mask_strides": ("i32",) * 4} if kind == "none" else {}
    given = constants(head_dim, granularity, values_in, kind)
    everywhere = (head_dim, kind) == (128, "none") and values_in != "fp16_fast" and granularity == "block"
    row = sampled(chosen(row_of(codes, values_in, kind), head_dim), everywhere)
    scores, values = "int8" if codes == torch.int8 else "fp8", "fp8" if values_in == "fp8" else "fp16"
    first = INTEGER_UNITS if codes == torch.int8 else FP8_UNITS
    second = FP8_UNITS if values_in == "fp8" else FLOAT_UNITS
    flops = {scores: 4 * head_dim} if scores == values else {scores: 2 * head_dim, values: 2 * head_dim}
    mask = "" if kind == "none" else f" {kind} mask"
    signature = typed(eight_bit_kernel, types, pointer, (*given, "BLOCK_M", "BLOCK_N", "FORM"))
    return CompileCase(
        name=f"{scores} scores {values_in} values {granularity} d{head_dim}{mask}",
        kernel=eight_bit_kernel,
        signature=signature,
        constexprs=given,
        divisible=aligned(signature, ("num_heads", "num_q_scales", "num_k_scales")),
        launch=row,
        opcodes={arch: tuple(dict.fromkeys((*first[arch], *second[arch]))) for arch in row},
        loop_flops=flops,
        loop_exps=1,
        tiles=("BLOCK_M", "BLOCK_N", "FORM"),
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The kernel in each precision."""
    return tuple(eight_bit_case(*case) for case in CASES)
