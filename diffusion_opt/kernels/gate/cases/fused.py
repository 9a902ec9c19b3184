"""Launches of adaptive norms and of norm with rotation, as FLUX.2, Wan and LTX-2 make them."""

from typing import Any

from diffusion_opt.kernels.fused.modulate import kernel as modulate
from diffusion_opt.kernels.fused.qk_norm_rope.kernel import (
    FLOAT_BLOCK,
    NOT_QUANTIZED,
    RMS_BLOCK,
    inverse_rms_kernel,
    norm_rope_kernel,
    quantized_constants,
    shape_constants,
)
from diffusion_opt.kernels.gate.case import NAN_STAYS, CompileCase, aligned, sampled, typed
from diffusion_opt.kernels.launch import ARCHITECTURES, LaunchConfig
from diffusion_opt.kernels.quantizers.kernel import num_warps, tokens_block
from diffusion_opt.kernels.quantizers.oracle import QUERY_GROUPS

TWICE = ("i32", "i32", "i32", "i32")  # tables that hold each number twice have a stride of 2, which is nothing special


def modulate_case(kernel: Any, channels: int, layer: bool, gated: bool) -> CompileCase:
    """Rows of bfloat16; sums over tokens are float32."""
    backward = kernel is modulate.backward_kernel
    fixed = {"LAYER": layer, "GATED": gated} | ({"RUN": modulate.RUN, "SHARED": True} if backward else {})
    choice = modulate.row_launch(channels)
    types = {"eps": "fp32"} | dict.fromkeys(("GRAD_GATE", "GRAD_SCALE", "GRAD_SHIFT"), "*fp32")
    what = f"modulate {'backward' if backward else 'forward'} {'layer' if layer else 'rms'} bf16 c{channels}"
    signature = typed(kernel, types, "*bf16", (*fixed, "BLOCK_C"))
    return CompileCase(
        name=f"{'gated ' * gated}{what}",
        kernel=kernel,
        signature=signature,
        constexprs={**fixed, "BLOCK_C": choice.block_n},
        divisible=aligned(signature, ("length",)),
        launch=sampled(dict.fromkeys(ARCHITECTURES, choice), everywhere=False),
        tiles=(),
    )


def rope_case(
    name: str, kernel: Any, block: int, output: str, oldest: int, tables: tuple[str, ...] = TWICE, **own: object
) -> CompileCase:
    """A launch on bfloat16 heads of 128 with float32 tables."""
    types = {"X": "*bf16", "WEIGHT": "*bf16", "Y": output, "eps": "fp32"}
    types |= dict.fromkeys(("INVERSE_RMS", "COS", "SIN", "MEAN", "SCALES", "SUMS"), "*fp32")
    types |= dict.fromkeys(("cos_strides", "sin_strides"), tables)
    choice = LaunchConfig(block, 1, num_warps(128), 1)
    signature = typed(kernel, types, "*bf16", (*own, "BLOCK_M"))
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=own,
        divisible=aligned(signature, ("num_heads", "num_scales", "cos_strides", "sin_strides")),
        launch=sampled({arch: choice for arch in ARCHITECTURES if arch >= oldest}, everywhere=False),
        tiles=("BLOCK_M",),
        ptx=NAN_STAYS if own.get("QUANTIZE") else (),
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """FLUX.2's 6144 channels, LTX-2's 4096 with the RMS norm; the three families' rotations, and queries to codes."""
    flux2, wan = shape_constants(128, False, "neighbors"), shape_constants(128, True, "neighbors")
    ltx2, plain = shape_constants(128, True, "halves"), {**NOT_QUANTIZED, "WITH_SUMS": True}
    groups = QUERY_GROUPS["block"]
    int8, fp8 = (quantized_constants(groups, integers, False) | {"WITH_SUMS": True} for integers in (True, False))
    once, kernel, block = ("i32", "i32", "i32", "1"), norm_rope_kernel, tokens_block(groups)
    return (
        modulate_case(modulate.forward_kernel, 6144, True, False),
        modulate_case(modulate.forward_kernel, 6144, True, True),
        modulate_case(modulate.forward_kernel, 4096, False, True),
        modulate_case(modulate.backward_kernel, 6144, True, True),
        rope_case("norm rope flux2 d128", kernel, FLOAT_BLOCK, "*bf16", 80, **flux2, **plain),
        rope_case("norm rope wan d128", kernel, FLOAT_BLOCK, "*bf16", 80, **wan, **plain),
        rope_case("norm rope ltx2 d128", kernel, FLOAT_BLOCK, "*bf16", 80, once, **ltx2, **plain),
        rope_case("norm rope flux2 to int8 d128", kernel, block, "*i8", 80, **flux2, **int8),
        rope_case("norm rope flux2 to fp8 d128", kernel, block, "*fp8e4nv", 89, **flux2, **fp8),
        rope_case("inverse rms d128", inverse_rms_kernel, RMS_BLOCK, "*bf16", 80, HEAD_DIM=128, PADDED_DIM=128),
    )
