"""Launches of the quantizers of q, k and v as the attentions use them."""

from typing import Any

from diffusion_opt.kernels.gate.case import NAN_STAYS, CompileCase, aligned, sampled, typed
from diffusion_opt.kernels.launch import ARCHITECTURES, LaunchConfig, padded_head_dim
from diffusion_opt.kernels.quantizers.kernel import (
    CHANNELS_ROWS,
    channels_kernel,
    group_constants,
    num_warps,
    nvfp4_kernel,
    shape_constants,
    tokens_block,
    tokens_kernel,
)
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK, KEY_GROUPS, QUERY_BLOCK, QUERY_GROUPS


def quantizer_case(name: str, kernel: Any, block: int, codes: str, oldest: int, **own: object) -> CompileCase:
    """A quantizer of bfloat16 heads of 128, on architectures from `oldest` on."""
    types = {"X": "*bf16", "MEAN": "*fp32", "SCALES": "*fp32"}
    given = {**shape_constants(128), **own}
    choice = LaunchConfig(block, 1, num_warps(padded_head_dim(128)), 1)
    signature = typed(kernel, types, codes, (*given, "BLOCK_M"))
    return CompileCase(
        name=f"{name} d128",
        kernel=kernel,
        signature=signature,
        constexprs=given,
        divisible=aligned(signature, ("num_heads", "num_scales", "num_means")),
        launch=sampled({arch: choice for arch in ARCHITECTURES if arch >= oldest}, everywhere=False),
        tiles=("BLOCK_M",),
        ptx=NAN_STAYS,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """Queries in INT8, keys and values in FP8, queries and values in NVFP4."""
    queries, keys = QUERY_GROUPS["thread"], KEY_GROUPS["block"]
    int8 = {**group_constants(queries, True), "CENTERED": False}
    fp8 = {**group_constants(keys, False), "CENTERED": True}
    nvfp4 = {"ALONG_TOKENS": False, "CENTERED": True}
    values = {"ALONG_TOKENS": True, "CENTERED": False}
    return (
        quantizer_case("quantize int8 queries", tokens_kernel, tokens_block(queries), "*i8", 80, **int8),
        quantizer_case("quantize fp8 keys", tokens_kernel, tokens_block(keys), "*fp8e4nv", 89, **fp8),
        quantizer_case("quantize fp8 values", channels_kernel, CHANNELS_ROWS, "*fp8e4nv", 89),
        quantizer_case("quantize nvfp4 queries", nvfp4_kernel, QUERY_BLOCK, "*bf16", 80, **nvfp4),
        quantizer_case("quantize nvfp4 values", nvfp4_kernel, KEY_BLOCK, "*bf16", 80, **values),
    )
