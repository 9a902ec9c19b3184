"""All compile cases of the room, gathered from the modules that have kernels."""

import importlib

from diffusion_opt.kernels.gate.case import CompileCase

MODULES = (
    "attention.dense.forward",
    "attention.dense.backward",
    "quantizers.kernel",
    "attention.eight_bit.forward",
    "attention.fp4.forward",
    "attention.fp4.backward",
    "fused.qk_norm_rope.kernel",
    "attention.sparse.forward",
    "attention.sparse.backward",
    "attention.region.forward",
    "fused.modulate.kernel",
    "gemm.kernel",
)


def all_cases() -> tuple[CompileCase, ...]:
    """The cases of every kernel module. Raises ValueError if two share a name."""
    cases = []
    for module in MODULES:
        cases += importlib.import_module(f"diffusion_opt.kernels.{module}").compile_cases()
    names = [case.name for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"the name of a compile case is its key in the report, so it must be unique: {repeated}")
    return tuple(cases)
