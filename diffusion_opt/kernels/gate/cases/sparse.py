"""Launches of attention over listed tiles and of region attention, as the gate compiles them."""

from dataclasses import replace
from typing import Any

import torch

from diffusion_opt.kernels.attention.region.forward import region_kernel
from diffusion_opt.kernels.attention.softmax_tiles import fitted
from diffusion_opt.kernels.attention.sparse.backward import sparse_keys_kernel, sparse_queries_kernel
from diffusion_opt.kernels.attention.sparse.forward import sparse_forward_kernel
from diffusion_opt.kernels.gate.case import FLOAT_UNITS, TRITON_TYPES, CompileCase, aligned, owning, sampled, typed
from diffusion_opt.kernels.launch import chosen, padded_head_dim, row_of
from diffusion_opt.kernels.tiles import precision

CASES = (  # (type, head dimension, side of the mask's blocks, whether ragged)
    (torch.bfloat16, 64, 128, False),
    (torch.bfloat16, 128, 128, False),
    (torch.bfloat16, 128, 64, True),
    (torch.bfloat16, 256, 64, True),
    (torch.float32, 64, 64, True),
)


def sparse_case(
    name: str, kernel: Any, flops_per_dim: int, dtype: torch.dtype, head_dim: int, block: int, ragged: bool,
    **constants: object,
) -> CompileCase:  # fmt: skip
    """A kernel that walks lists (`flops_per_dim` per score and number of a head); `ragged` tiles are bounded."""
    constants |= {end: ragged for end in ("TAIL", "QUERY_TAIL", "HAS_LENGTHS") if end in kernel.arg_names}
    fixed = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim), "PRECISION": precision(dtype), **constants}
    types = dict.fromkeys(("LSE", "LSE2", "DELTA"), "*fp32") | dict.fromkeys(("scale", "sigma"), "fp32")
    types |= dict.fromkeys(("INDEX", "INDICES", "COUNTS", "LENGTHS"), "*i32")
    by_keys = name == "block_sparse_keys"
    everywhere = (dtype, head_dim, block) == (torch.bfloat16, 128, 128)
    choices = sampled(chosen(row_of(name, dtype), head_dim), everywhere)
    choices = {arch: fitted(choice, block, block, by_keys) for arch, choice in choices.items()}
    flops = flops_per_dim * padded_head_dim(head_dim)
    signature = typed(kernel, types, f"*{TRITON_TYPES[dtype]}", (*fixed, "BLOCK_M", "BLOCK_N"))
    return CompileCase(
        name=f"{name.replace('_', ' ')} {TRITON_TYPES[dtype]} d{head_dim} blocks of {block}{' ragged' * ragged}",
        kernel=kernel,
        signature=signature,
        constexprs=fixed,
        divisible=aligned(signature, ("num_heads", "list_b", "list_h", "most")),
        launch=choices,
        opcodes=owning(choices, FLOAT_UNITS, by_keys),
        loop_flops={"tf32": 3 * flops} if dtype == torch.float32 else {TRITON_TYPES[dtype]: flops},
        loop_exps=1,
    )


def compile_cases() -> tuple[CompileCase, ...]:
    """The block-sparse kernels, and region attention to a whole cache and by a mask; its copy has no matrix work."""
    kernels = (
        ("block_sparse_forward", sparse_forward_kernel, 4),
        ("block_sparse_queries", sparse_queries_kernel, 6),
        ("block_sparse_keys", sparse_keys_kernel, 8),
    )
    listed = [sparse_case(*kernel, *case) for kernel in kernels for case in CASES]
    region = ("region", region_kernel, 4)
    cases = ((torch.bfloat16, 64, 128, False), (torch.bfloat16, 128, 128, False), (torch.float32, 64, 64, True))
    whole = [sparse_case(*region, *case, LISTED=False) for case in cases]
    whole = [replace(case, name=case.name.partition(" blocks")[0]) for case in whole]
    return (*listed, *whole, sparse_case(*region, torch.bfloat16, 128, 64, True, LISTED=True))
