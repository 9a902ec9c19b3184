"""How fast a kernel could be at best, read off its machine code: a static roofline of the main loop.

One pass of the main loop works on one tile (attention: BLOCK_M queries x BLOCK_N keys) and keeps three units of a
streaming multiprocessor (SM) busy for a number of clock cycles:

    needed  = sum over operand types of FLOP / (FLOP per cycle of the matrix units)
    tensor  = needed x the matrix work in the code / the matrix work needed
    special = 32 warps MUFU.EX2 / 16                       the unit for exponentials: 16 results a cycle
    issue   = warps instructions / 4                       4 schedulers, each starts one warp instruction a cycle

If nothing overlapped, the kernel would reach the fraction `serial` of the matrix units' peak; with perfect overlap of
everything, `overlapped`:

    serial = needed / (tensor + max(special, issue))       overlapped = needed / max(tensor, special, issue)

Needed and done differ more often than one would think. On sm_90 four warps share an instruction of 64 rows. Of a tile
of 64 rows on eight warps, both halves may then multiply the same, and nothing but this count shows it. float32 by three
TF32 products shows as 3.

A kernel whose programs alternate between matrix and softmax work ends up between the two, nearer to `overlapped` the
more programs share an SM. Memory is left out: attention on thousands of tokens does hundreds of FLOP per byte (Dao
2023, arXiv 2307.08691). The model says what the code can never exceed and which unit to relieve; what it does reach is
for `benchmarks/attention.py` on a GPU. That exponentials and not matrix work can bind attention is the starting point
of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).

Both numbers take it that a tile's matrix instructions follow one another without a pause. Where each is waited for
(`Loop.serialized`), neither bounds anything, and none is given.

FLOP come from the case (`loop_flops`), instructions from the code. A compiler may unroll, so the passes of the source's
loop in one pass of the machine's loop are found by comparing exponentials and matrix work with those of a tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.gate.sass import WARP, Loop

SCHEDULERS = 4  # of an SM, each issues one warp instruction a cycle (all five architectures)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU of an architecture. Figures are those of its vendor, dense (not the doubled ones "with sparsity")."""

    name: str
    source: str
    multiprocessors: int
    clock_ghz: float  # the boost clock that the peak is stated at
    flops_per_cycle: Mapping[str, int]  # per SM and operand type, sums in fp32 (integers: int32)
    exps_per_cycle: int  # per SM (CUDA C++ programming guide, throughput of native arithmetic instructions)
    memory_gb_per_s: float
    registers: int = 65536  # 32-bit registers of an SM
    shared_bytes: int = 0  # shared memory of an SM
    threads: int = 2048  # resident threads of an SM

    def peak_tflops(self, operand: str) -> float:
        """Peak of the whole GPU in TFLOPS for matrix products of an operand type."""
        return self.flops_per_cycle[operand] * self.multiprocessors * self.clock_ghz / 1e3


HARDWARE: dict[int, Hardware] = {
    80: Hardware(
        "A100 SXM 80 GB", "NVIDIA A100 architecture whitepaper, table 3; datasheet", 108, 1.41,
        {"fp32": 128, "tf32": 1024, "bf16": 2048, "fp16": 2048, "int8": 4096}, 16, 2039, shared_bytes=164 * 1024,
    ),
    89: Hardware(
        "RTX 4090", "NVIDIA Ada architecture whitepaper, appendix A", 128, 2.52,
        {"fp32": 256, "tf32": 256, "bf16": 512, "fp16": 512, "int8": 2048, "fp8": 1024}, 16, 1008,
        shared_bytes=100 * 1024, threads=1536,
    ),
    90: Hardware(
        "H200 SXM", "NVIDIA H100 architecture whitepaper, table 2; H200 datasheet", 132, 1.83,
        {"fp32": 256, "tf32": 2048, "bf16": 4096, "fp16": 4096, "int8": 8192, "fp8": 8192}, 16, 4800,
        shared_bytes=228 * 1024,
    ),
    100: Hardware(
        "B200", "NVIDIA Blackwell datasheet; per cycle: FlashAttention-4 (Zadouri et al. 2026), section 2", 148, 1.85,
        {"fp32": 256, "tf32": 4096, "bf16": 8192, "fp16": 8192, "int8": 16384, "fp8": 16384, "fp4": 32768}, 16, 8000,
        shared_bytes=228 * 1024,
    ),
    120: Hardware(
        "RTX 5090", "NVIDIA RTX Blackwell architecture whitepaper, appendix A", 170, 2.407,
        {"fp32": 256, "tf32": 256, "bf16": 512, "fp16": 512, "int8": 2048, "fp8": 1024, "fp4": 4096}, 16, 1792,
        shared_bytes=100 * 1024, threads=1536,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Roofline:
    """Cycles of one SM for one tile, and what they allow."""

    tensor: float
    special: float
    issue: float
    needed: float  # of the matrix units, for the arithmetic that the operation asks for

    @property
    def serial(self) -> float:
        """Fraction of the matrix units' peak if nothing overlapped."""
        return self.needed / (self.tensor + max(self.special, self.issue))

    @property
    def overlapped(self) -> float:
        """Fraction of the matrix units' peak if everything overlapped."""
        return self.needed / max(self.tensor, self.special, self.issue)

    @property
    def bound_by(self) -> str:
        """The unit that is busy longest: "tensor", "special" or "issue"."""
        return max(("tensor", "special", "issue"), key=lambda unit: getattr(self, unit))


def roofline(case: CompileCase, arch: int, loop: Loop | None) -> Roofline | None:
    """The static roofline of a compiled case; None for a loop without matrix work, or with serialized work.

    Raises ValueError if the hardware has no rate for an operand type of the case.
    """
    if loop is None or not case.loop_flops or loop.serialized:
        return None
    hardware, choice = HARDWARE[arch], case.launch[arch]
    missing = set(case.loop_flops) - set(hardware.flops_per_cycle)
    if missing:
        raise ValueError(
            f"{case.name}: {hardware.name} (sm_{arch}) multiplies no {', '.join(sorted(missing))}; leave this "
            "architecture out of the case's launch choices, or give in loop_flops the type it falls back to"
        )
    passes = unrolled(case, arch, loop)
    elements = choice.block_m * choice.block_n
    needed = sum(flops * elements / hardware.flops_per_cycle[kind] for kind, flops in case.loop_flops.items())
    special = loop.exponentials * WARP * choice.num_warps / hardware.exps_per_cycle / passes
    issue = loop.instructions * choice.num_warps / SCHEDULERS / passes
    return Roofline(needed * (matrix_work(case, arch, loop) or 1), special, issue, needed)


def matrix_work(case: CompileCase, arch: int, loop: Loop) -> float | None:
    """Matrix work of the code relative to what the case needs: 1, or more where products are repeated.

    None where the opcodes do not tell (sm_100); the roofline then takes 1.
    """
    if loop.flops is None or not case.loop_flops:
        return None
    choice = case.launch[arch]
    needed = sum(case.loop_flops.values()) * choice.block_m * choice.block_n * unrolled(case, arch, loop)
    return loop.flops * choice.num_warps / needed


def unrolled(case: CompileCase, arch: int, loop: Loop) -> int:
    """How many passes of the source's loop one pass of the machine's loop makes, at least 1.

    By the exponentials where there are any: a tile has one for each element and a few more for the rescaling, so the
    quotient is rounded down. Warps that repeat each other's products repeat the exponentials too; but the matrix work,
    where the opcodes tell it, is never less than needed, so there are at most as many passes as it suffices for.
    """
    choice = case.launch[arch]
    elements = choice.block_m * choice.block_n
    bounds = []
    if case.loop_exps:
        bounds.append(int(loop.exponentials * WARP * choice.num_warps / (case.loop_exps * elements)))
    if loop.flops is not None:
        bounds.append(int(loop.flops * choice.num_warps / (sum(case.loop_flops.values()) * elements)))
    return max(1, min(bounds, default=1))


def programs_per_multiprocessor(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs of a kernel an SM holds at a time: what registers, shared memory and threads allow.

    Registers are given to warps in units of 256, and each program costs 1 KiB of shared memory beside its own.
    """
    hardware = HARDWARE[arch]
    per_warp = -(-registers * WARP // 256) * 256
    return min(
        hardware.registers // (per_warp * num_warps),
        hardware.shared_bytes // (shared_bytes + 1024),
        hardware.threads // (WARP * num_warps),
    )
