"""What the ahead-of-time gate compiles: each kernel, with the arguments its launcher would give it.

A Triton kernel has no machine code of its own. The code depends on the types of the arguments, on those known to be
divisible by 16 or equal to 1, on the constants, on the tile sizes and on the architecture. A `CompileCase` writes down
one such choice per architecture, exactly as the launch table makes it, so what the gate inspects is what a GPU would
run. Each kernel module describes its own kernels in `compile_cases()`; `cases.all_cases()` gathers them. Nothing here
needs a GPU, and nothing here compiles: `aot.py` does.

An example, for a kernel `_forward(Q, K, OUT, scale, length, stride, BLOCK_M, BLOCK_N, HEAD_DIM)`:

    CompileCase(
        name="dense forward bf16 d128",
        kernel=_forward,
        signature={"Q": "*bf16", "K": "*bf16", "OUT": "*bf16", "scale": "fp32", "length": "i32", "stride": "i32",
                   "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "HEAD_DIM": "constexpr"},
        constexprs={"HEAD_DIM": 128},                            # the tiles come from the launch table
        divisible=("Q", "K", "OUT", "stride"),
        launch={arch: launch("dense_forward", arch, 128) for arch in ARCHITECTURES},
        opcodes={80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)},
        loop_flops={"bf16": 4 * 128},                            # 2 D for the scores, 2 D for the values
        loop_exps=1,
    )
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from diffusion_opt.kernels.launch import ARCHITECTURES, LaunchConfig

SAMPLED = (90, 120)  # where variants are compiled: Hopper, and single warps with the least shared memory
OPERANDS = ("fp32", "tf32", "bf16", "fp16", "int8", "fp8", "fp4")


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One kernel with the arguments of a launch. Raises ValueError where the parts do not fit together."""

    name: str  # "dense forward bf16 d128"; unique, the key of the committed report
    kernel: Callable  # the @triton.jit function
    signature: Mapping[str, str]  # every argument in order: "*bf16", "*fp8e4nv", "i32", "fp32", "constexpr"
    constexprs: Mapping[str, object]  # values of the constexpr arguments; a stride known to be 1 is one of them
    divisible: tuple[str, ...]  # pointers aligned to 16 bytes and integers divisible by 16
    launch: Mapping[int, LaunchConfig]  # by architecture; one that is absent is not supported
    opcodes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # matrix opcodes that must appear
    loop_flops: Mapping[str, int] = field(default_factory=dict)  # per tile element and iteration, by operand type
    loop_exps: float = 0  # exponentials per tile element and iteration: 1 for softmax
    tiles: tuple[str, ...] = ("BLOCK_M", "BLOCK_N")  # constexpr arguments that the launch choice's tile sizes fill

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
        return {**self.constexprs, **dict(zip(self.tiles, (choice.block_m, choice.block_n), strict=False))}


def sampled(choices: Mapping[int, LaunchConfig], everywhere: bool) -> dict[int, LaunchConfig]:
    """Launch choices that the gate compiles: all of them, or for a variant those of `SAMPLED`.

    Real models have bfloat16 heads of 128, which are compiled for every architecture. A variant (another head
    dimension or type, a mask) mostly repeats what they show, at a second of compiler time each.
    """
    return {arch: choice for arch, choice in choices.items() if everywhere or arch in SAMPLED}
