"""Read a kernel's machine code (SASS): what it uses, and what its main loop is made of.

`cuobjdump -sass -res-usage` prints one instruction a line behind its address:

    /*16c0*/   @!P3 HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;

From that text come the resources (registers, stack), spills (`LDL`, `STL`: registers that did not fit and went to
memory), the matrix opcodes, asynchronous copies, and the main loop. The opcode tells which unit works:

    HMMA IMMA QMMA OMMA         one warp: 16-bit, integer, FP8, FP4 operands          (sm_80, 89, 120)
    HGMMA IGMMA QGMMA           a group of four warps, operands in shared memory      (sm_90)
    UTCHMMA UTCIMMA UTCQMMA UTCOMMA   one thread starts it, sums in tensor memory     (sm_100)

A compiler that cannot use the fast unit falls back to a slow one and says nothing; here it shows. So does another thing
it hides: GMMA instructions run beside other work until `WARPGROUP.DEPBAR` waits for them. Two products a tile need two
waits or fewer; as many waits as instructions say that ptxas serialized them, one after the other, with nothing beside.

The main loop is the innermost natural loop with the most matrix work, and the shortest of several that do as much: one
that checks bounds for the last tile is not it. A backward branch alone does not make a loop:
waits on barriers are placed behind the code and jump back. So the flow graph is built from the branches, and an edge
u -> v closes a loop only where v dominates u (every way to u goes through v; Aho, Sethi and Ullman 1986, section 10.4).
"""

import re
from collections import Counter
from dataclasses import dataclass, field

WARP = 32  # threads
WARP_GROUP = 4  # warps that share one GMMA instruction

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_MATRIX = re.compile(r"(UTC)?(O|H|I|Q|B|D)(G)?MMA$")
_WARP_SHAPE = re.compile(r"\.(16|8)(8)(4|8|16|32|64|128|256)(?:\.|$)")  # HMMA.16816: 16 x 8 x 16
_GROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")  # HGMMA.64x128x16

CLASSES = {  # the unit an opcode keeps busy, by the start of its name; what is missing here counts as "other"
    "exp": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FCHK"),
    "fp16": ("HADD", "HMUL", "HFMA", "HMNMX", "HSET"),
    "convert": ("F2F", "I2F", "F2I", "I2I", "FRND"),
    "integer": (
        "IADD",
        "IMAD",
        "IMNMX",
        "ISETP",
        "LEA",
        "LOP",
        "SHF",
        "PRMT",
        "SGXT",
        "SEL",
        "VIADD",
        "VIMNMX",
        "BMSK",
    ),
    "memory": ("LD", "ST", "LDGSTS", "ATOM", "RED", "UTMA", "UBLK", "DEPBAR"),
    "shuffle": ("SHFL", "MOVM", "REDUX"),
    "uniform": ("U", "R2UR"),
    "move": ("MOV", "CS2R", "S2R", "P2R", "R2P", "PLOP", "S2UR"),
    "control": (
        "BRA",
        "BAR",
        "BSSY",
        "BSYNC",
        "WARPSYNC",
        "SYNCS",
        "WARPGROUP",
        "NOP",
        "EXIT",
        "FENCE",
        "MEMBAR",
        "ELECT",
    ),
}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction. `opcode` has its modifiers ("MUFU.EX2"), `name` is the part before the first dot."""

    address: int  # bytes
    opcode: str
    operands: str
    predicated: bool

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_matrix(self) -> bool:
        return _MATRIX.match(self.name) is not None

    @property
    def target(self) -> int | None:
        """Where a direct branch jumps to; None for everything else."""
        found = _TARGET.findall(self.operands) if self.name == "BRA" else []
        return int(found[-1], 16) if found else None

    @property
    def matrix_flops(self) -> int | None:
        """FLOP of one matrix instruction per warp; None where the opcode does not tell its shape (UTC…)."""
        group = _GROUP_SHAPE.search(self.opcode)
        shape = group or _WARP_SHAPE.search(self.opcode)
        if not self.is_matrix or shape is None:
            return None
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k // (WARP_GROUP if group else 1)


@dataclass(frozen=True, slots=True)
class Loop:
    """The main loop of a kernel: instructions of one pass, by unit, and its matrix work."""

    instructions: int
    mix: dict[str, int]  # by CLASSES, "matrix" and "other"
    exponentials: int  # MUFU.EX2
    matrix: dict[str, int]  # matrix instructions by name
    flops: int | None  # of the matrix instructions, per warp; None where the opcodes do not tell
    waits: int = 0  # for asynchronous matrix instructions: WARPGROUP.DEPBAR

    @property
    def serialized(self) -> bool:
        """Whether each asynchronous matrix instruction is waited for before the next starts."""
        asynchronous = sum(count for name, count in self.matrix.items() if name.endswith("GMMA"))
        return asynchronous > 1 and self.waits >= asynchronous


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What one compiled kernel uses."""

    registers: int  # per thread
    stack_bytes: int
    spill_loads: int  # LDL instructions
    spill_stores: int  # STL instructions
    instructions: int
    matrix: dict[str, int] = field(default_factory=dict)  # matrix instructions by name
    async_copies: int = 0  # LDGSTS: global to shared memory, past the registers
    tma: int = 0  # bulk copies by the copy engine
    loop: Loop | None = None  # None where there is no loop with matrix work

    @property
    def asynchronous_products(self) -> bool:
        """Whether it has matrix instructions of groups of warps, which must be waited for (sm_90)."""
        return any(name.endswith("GMMA") for name in self.matrix)


def read_sass(text: str) -> MachineCode:
    """Summarize the output of `cuobjdump -sass -res-usage` for a file with one kernel.

    Raises ValueError if there are no resources or no instructions in it.
    """
    resources = _RESOURCES.search(text)
    code = instructions_of(text)
    if resources is None or not code:
        raise ValueError(f"no machine code in the output of cuobjdump: {text.strip()[:200]!r}")
    names = Counter(one.name for one in code)
    return MachineCode(
        registers=int(resources[1]),
        stack_bytes=int(resources[2]),
        spill_loads=names["LDL"],
        spill_stores=names["STL"],
        instructions=sum(count for name, count in names.items() if name != "NOP"),
        matrix=_matrix(code),
        async_copies=names["LDGSTS"],
        tma=sum(count for name, count in names.items() if name.startswith(("UTMALDG", "UTMASTG", "UBLKCP"))),
        loop=main_loop(code),
    )


def instructions_of(text: str) -> list[Instruction]:
    """The instructions in the order of their addresses."""
    found = _LINE.findall(text)
    return [Instruction(int(address, 16), opcode, rest.strip(), bool(p)) for address, p, opcode, rest in found]


def main_loop(code: list[Instruction]) -> Loop | None:
    """The innermost loop with the most matrix instructions; None if no loop has any."""
    with_work = []
    for body in _natural_loops(code):
        inside = [code[i] for i in sorted(body)]
        if any(one.is_matrix for one in inside):
            with_work.append((body, inside))
    innermost = [
        inside for body, inside in with_work if not any(other < body for other, _ in with_work)
    ]  # a set smaller than another is a loop inside it
    if not innermost:
        return None
    inside = max(innermost, key=lambda loop: (sum(one.is_matrix for one in loop), -len(loop)))
    flops = [one.matrix_flops for one in inside if one.is_matrix]
    return Loop(
        instructions=len(inside),
        mix=dict(sorted(Counter(unit(one) for one in inside).items())),
        exponentials=sum(one.opcode.startswith("MUFU.EX2") for one in inside),
        matrix=_matrix(inside),
        flops=None if None in flops else sum(flops),
        waits=sum(one.opcode.startswith("WARPGROUP.DEPBAR") for one in inside),
    )


def unit(instruction: Instruction) -> str:
    """The class of an instruction: "matrix", one of CLASSES, or "other"."""
    if instruction.is_matrix:
        return "matrix"
    fitting = [
        (len(start), kind) for kind, starts in CLASSES.items() for start in starts if instruction.name.startswith(start)
    ]
    return max(fitting)[1] if fitting else "other"


def _matrix(code: list[Instruction]) -> dict[str, int]:
    return dict(sorted(Counter(one.name for one in code if one.is_matrix).items()))


def _natural_loops(code: list[Instruction]) -> list[frozenset[int]]:
    """Indices of the instructions of each natural loop; loops with the same head are one."""
    starts, successors = _blocks(code)
    predecessors = {block: [a for a in successors if block in successors[a]] for block in successors}
    dominators = _dominators(successors, predecessors)
    loops: dict[int, set[int]] = {}
    for tail, heads in successors.items():
        for head in heads:
            if tail not in dominators or head not in dominators[tail]:
                continue  # not reachable, or a jump back that is no loop
            body, open_blocks = loops.setdefault(head, {head}), [tail]
            while open_blocks:
                block = open_blocks.pop()
                if block not in body:
                    body.add(block)
                    open_blocks += [p for p in predecessors[block] if p in dominators]
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    return [frozenset(i for block in body for i in range(block, ends[block])) for body in loops.values()]


def _blocks(code: list[Instruction]) -> tuple[list[int], dict[int, list[int]]]:
    """Basic blocks by the index of their first instruction, and where each can go on."""
    index = {one.address: i for i, one in enumerate(code)}
    leaves = [i for i, one in enumerate(code) if one.name in ("BRA", "EXIT", "RET", "BRX")]
    starts = {0, *(i + 1 for i in leaves if i + 1 < len(code))}
    starts |= {index[code[i].target] for i in leaves if code[i].target in index}
    ordered = sorted(starts)
    successors = {}
    for start, following in zip(ordered, [*ordered[1:], len(code)], strict=True):
        last = code[following - 1]
        jumps = [index[last.target]] if last.target in index else []
        always = last.name in ("BRA", "EXIT", "RET", "BRX") and not _conditional(last)
        successors[start] = jumps + ([] if always or following == len(code) else [following])
    return ordered, successors


def _conditional(branch: Instruction) -> bool:
    """Whether a branch may fall through: by a predicate before it or, for `BRA.U !UP0, …`, among its operands."""
    return branch.predicated or re.search(r"U?P\d", branch.operands) is not None


def _dominators(successors: dict[int, list[int]], predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached from the first, the blocks on every way to it."""
    reached, open_blocks = {0}, [0]
    while open_blocks:
        fresh = [block for block in successors[open_blocks.pop()] if block not in reached]
        reached.update(fresh)
        open_blocks += fresh
    dominators = {block: {0} if block == 0 else set(reached) for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            ways = [dominators[p] for p in predecessors[block] if p in reached]
            fresh = {block} | set.intersection(*ways)
            changed |= fresh != dominators[block]
            dominators[block] = fresh
    return dominators
