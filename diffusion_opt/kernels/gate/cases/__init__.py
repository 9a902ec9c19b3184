"""All compile cases of the room. A module of this folder describes the launches of one folder of kernels."""

import importlib

from diffusion_opt.kernels.gate.case import CompileCase

MODULES = ("dense", "eight_bit", "fp4", "sparse", "quantizers", "fused", "gemm")


def all_cases() -> tuple[CompileCase, ...]:
    """The cases of every folder of kernels. Raises ValueError if two share a name."""
    cases = []
    for module in MODULES:
        cases += importlib.import_module(f"{__name__}.{module}").compile_cases()
    names = [case.name for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"the name of a compile case is its key in the report, so it must be unique: {repeated}")
    return tuple(cases)
