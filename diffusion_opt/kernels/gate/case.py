"""What the ahead-of-time gate compiles: each kernel, with the arguments its launcher would give it.

A Triton kernel has no machine code of its own. The code depends on the types of the arguments, on those known to be
divisible by 16 or equal to 1, on the constants, on the tile sizes and on the architecture. A `CompileCase` writes down
one such choice per architecture, exactly as the launch table makes it, so what the gate inspects is what a GPU would
run. The modules of `cases/` describe the launches of each folder of kernels; `cases.all_cases()` gathers them. Nothing
here needs a GPU, and nothing here compiles: `aot.py` does.

An example, for a kernel `_forward(Q, K, OUT, scale, length, strides, BLOCK_M, BLOCK_N, HEAD_DIM)`:

    CompileCase(
        name="dense forward bf16 d128",
        kernel=_forward,
        signature={"Q": "*bf16", "K": "*bf16", "OUT": "*bf16", "scale": "fp32", "length": "i32",
                   "strides": ("i32", "1"), "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "HEAD_DIM": "constexpr"},
        constexprs={"HEAD_DIM": 128},                            # the tiles come from the launch table
        divisible=("Q", "K", "OUT", "strides"),
        launch={arch: launch("dense_forward", arch, 128) for arch in ARCHITECTURES},
        opcodes={80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)},
        loop_flops={"bf16": 4 * 128},                            # 2 D for the scores, 2 D for the values
        loop_exps=1,
    )
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion_opt.kernels.launch import ARCHITECTURES, LaunchConfig

SAMPLED = (90, 120)  # where variants are compiled: Hopper, and single warps with the least shared memory
OPERANDS = ("fp32", "tf32", "bf16", "fp16", "int8", "fp8", "fp4")
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

FLOAT_UNITS = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)}
INTEGER_UNITS = {80: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA",), 100: ("IMMA",), 120: ("IMMA",)}
FP8_UNITS = {89: ("QMMA",), 90: ("QGMMA",), 100: ("UTCQMMA",), 120: ("QMMA",)}
ROWS_OF_A_GROUP = 64  # of an instruction that a group of warps shares (HGMMA, UTCHMMA); fewer take single warps' HMMA
NAN_STAYS = ("max.NaN.f32",)  # in PTX: a scale is NaN where a number is (`quantizers/rounding.py`)

Type = str | tuple[str, ...]  # "*bf16", "*fp8e4nv", "i32", "fp32", "constexpr", "1": a number known to be 1; or several


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One kernel with the arguments of a launch. Raises ValueError where the parts do not fit together."""

    name: str  # "dense forward bf16 d128"; unique, the key of the committed report
    kernel: Callable  # the @triton.jit function
    signature: Mapping[str, Type]  # every argument in order; a tuple of strides is one argument
    constexprs: Mapping[str, object]  # values of the constexpr arguments
    divisible: tuple[str, ...]  # pointers aligned to 16 bytes and integers divisible by 16
    launch: Mapping[int, LaunchConfig]  # by architecture; one that is absent is not supported
    opcodes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # matrix opcodes that must appear
    loop_flops: Mapping[str, int] = field(default_factory=dict)  # per tile element and iteration, by operand type
    loop_exps: float = 0  # exponentials per tile element and iteration: 1 for softmax
    tiles: tuple[str, ...] = ("BLOCK_M", "BLOCK_N")  # constexpr arguments that the launch choice fills; FORM is next
    ptx: tuple[str, ...] = ()  # instructions of the virtual machine that must appear, by the start of their names

    def __post_init__(self) -> None:
        constants = {name for name, kind in self.signature.items() if kind == "constexpr"}
        given = set(self.constexprs) | set(self.tiles)
        if constants != given:
            raise ValueError(
                f"{self.name}: constexpr arguments without value: {sorted(constants - given)}; "
                f"values for what is no constexpr argument: {sorted(given - constants)}"
            )
        unknown = set(self.divisible) - (set(self.signature) - constants)
        if unknown:
            raise ValueError(f"{self.name}: divisible names {sorted(unknown)}, which are no run-time arguments")
        foreign = (set(self.launch) | set(self.opcodes)) - set(ARCHITECTURES)
        if foreign or not self.launch:
            raise ValueError(f"{self.name}: architectures must be some of {ARCHITECTURES}, got {sorted(self.launch)}")
        if set(self.loop_flops) - set(OPERANDS):
            raise ValueError(f"{self.name}: operand types must be of {OPERANDS}, got {sorted(self.loop_flops)}")

    def constants(self, arch: int) -> dict[str, object]:
        """All constexpr values for an architecture, tiles included."""
        choice = self.launch[arch]
        chosen = (choice.block_m, choice.block_n, choice.form)
        return {**self.constexprs, **dict(zip(self.tiles, chosen, strict=False))}


def sampled(choices: Mapping[int, LaunchConfig], everywhere: bool) -> dict[int, LaunchConfig]:
    """Launch choices that the gate compiles: all of them, or for a variant those of `SAMPLED`.

    Real models have bfloat16 heads of 128, which are compiled for every architecture. A variant (another head
    dimension or type, a mask) mostly repeats what they show, at a second of compiler time each.
    """
    return {arch: choice for arch, choice in choices.items() if everywhere or arch in SAMPLED}


def typed(kernel: Any, types: Mapping[str, Type], pointer: str, constants: Iterable[str]) -> dict[str, Type]:
    """The types of a kernel's arguments: as named, else by their names.

    Capitals are pointers, of type `pointer`; `…_strides` are the four of a tensor whose last axis is contiguous,
    `…_steps` two of a row; what remains is an integer.
    """
    by_end = {"strides": ("i32", "i32", "i32", "1"), "steps": ("i32", "i32")}
    found = {}
    for name in kernel.arg_names:
        usual = pointer if name.isupper() else by_end.get(name.rpartition("_")[2], "i32")
        found[name] = "constexpr" if name in constants else types.get(name, usual)
    return found


def aligned(signature: Mapping[str, Type], uneven: Iterable[str]) -> tuple[str, ...]:
    """The arguments that are divisible by 16 in a launch on whole tiles: pointers and integers, but for `uneven`."""
    run_time = [name for name, kind in signature.items() if kind not in ("constexpr", "fp32", "1")]
    return tuple(name for name in run_time if name not in uneven)


def owning(choices: Mapping[int, LaunchConfig], units: Mapping[int, tuple[str, ...]], keys: bool) -> dict:
    """Matrix opcodes of programs that own queries, or `keys`: with few rows, those of single warps."""
    rows = {arch: choice.block_n if keys else choice.block_m for arch, choice in choices.items()}
    return {arch: units[arch] if rows[arch] >= ROWS_OF_A_GROUP else ("HMMA",) for arch in choices}
