"""The committed table of compiled kernels, and the gate that compares with it.

`compile_report.json` holds a row for each case and architecture: registers, spills, shared memory, instructions, matrix
opcodes, the main loop by unit, and the static roofline. It is made by

    diffusion-opt kernels report --update

and read in review: the diff of a changed kernel shows what the change costs on five GPU generations. The gate compiles
again and asks two questions of each row. `problems`: may this be launched at all, whatever the table says? Spilled
registers, missing matrix opcodes, matrix instructions that are waited for one by one, a maximum that loses NaN, or more
shared memory than an SM has are refused. `differences`: is it worse than
recorded? Some slack is allowed, so that a small change of a kernel does not ask for a new table. A new Triton does, and
its pin is exact. Better than recorded passes; `--update` writes it down.

Each row has the digest of its source. The same source and the same Triton give the same machine code, so `--changed`
and the tests compile the rows whose source is another, and the tests a sample of the others.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusion_opt.datasets.writing import write_text
from diffusion_opt.kernels.gate.aot import Compiled, Failure, Job, compile_all, source_key
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.gate.roofline import matrix_work, programs_per_multiprocessor, roofline

REPORT = Path(__file__).with_name("compile_report.json")
REFRESH = "diffusion-opt kernels report --update"
# how much more than recorded is no difference: a share where below 1
SLACK = {
    "waits": 1,
    "registers": 8,
    "shared_bytes": 1024,
    "instructions": 0.05,
    "loop_instructions": 0.05,
    "matrix_work": 0.02,
}
TENSOR_MEMORY_COLUMNS = 512  # of an SM of sm_100 (CUDA programming guide)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure that got worse, or a row that appeared or vanished."""

    kernel: str
    arch: int
    what: str
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.kernel} on sm_{self.arch}: {self.what} was {self.was}, is {self.now}"


def jobs(cases: Iterable[CompileCase], arch: int | None = None) -> list[Job]:
    """Every case on each of its architectures, or on one."""
    return [(case.name, one) for case in cases for one in sorted(case.launch) if arch in (None, one)]


def compile_rows(
    cases: Iterable[CompileCase],
    wanted: Iterable[Job],
    workers: int = 2,
    report: Callable[[Compiled | Failure], None] | None = None,
) -> tuple[dict[Job, Row], list[str]]:
    """Compile the wanted jobs. Returns their rows, and what is wrong with them regardless of any table."""
    named = {case.name: case for case in cases}
    rows, wrong = {}, []
    for result in compile_all(wanted, workers=workers, report=report):
        if isinstance(result, Failure):
            wrong.append(f"{result.name} on sm_{result.arch}: does not compile: {result.reason}")
            continue
        rows[result.name, result.arch] = row_of(named[result.name], result)
        wrong += problems(named[result.name], result)
    return rows, wrong


def row_of(case: CompileCase, compiled: Compiled) -> Row:
    """A row of the table. Cycles are those of one tile on one SM, `serial` and `overlapped` fractions of the peak.

    `matrix_work` above 1 says that the code multiplies more than the operation needs (see `roofline.py`).
    """
    code = compiled.code
    choice = case.launch[compiled.arch]
    row = {
        "tile": [choice.block_m, choice.block_n],
        "warps": choice.num_warps,
        "stages": choice.num_stages,
        "form": choice.form,
        "registers": code.registers,
        "spills": code.spill_loads + code.spill_stores,
        "shared_bytes": compiled.shared_bytes,
        "programs_per_sm": resident_programs(case, compiled),
        "instructions": code.instructions,
        "matrix": code.matrix,
        "async_copies": code.async_copies,
        "tma": code.tma,
        "source": compiled.source,
    }
    if code.asynchronous_products and code.loop is not None:
        row |= {"waits": code.loop.waits, "remarks": list(compiled.remarks)}
    if code.loop is not None:
        row |= {"loop_instructions": code.loop.instructions, "loop_mix": code.loop.mix}
    bound = roofline(case, compiled.arch, code.loop)
    if bound is not None:
        work = matrix_work(case, compiled.arch, code.loop)
        row["matrix_work"] = None if work is None else round(work, 2)
        cycles = {unit: round(value) for unit, value in asdict(bound).items()}
        row["cycles"] = cycles
        row |= {"serial": round(bound.serial, 2), "overlapped": round(bound.overlapped, 2), "bound_by": bound.bound_by}
    return row


def resident_programs(case: CompileCase, compiled: Compiled) -> int:
    """How many programs of this kernel one SM holds at a time."""
    warps = case.launch[compiled.arch].num_warps
    return programs_per_multiprocessor(compiled.arch, compiled.code.registers, compiled.shared_bytes, warps)


def problems(case: CompileCase, compiled: Compiled) -> list[str]:
    """Why this launch choice must not be in the launch table; empty if it may."""
    where, code = f"{case.name} on sm_{compiled.arch}", compiled.code
    found = []
    if code.spill_loads or code.spill_stores:
        found.append(
            f"{where}: registers spill ({code.spill_loads} loads, {code.spill_stores} stores, {code.stack_bytes} bytes "
            "of stack a thread); choose a smaller tile or more warps in the launch table"
        )
    missing = [opcode for opcode in case.opcodes.get(compiled.arch, ()) if opcode not in code.matrix]
    if missing:
        found.append(f"{where}: no {', '.join(missing)} in the machine code, only {', '.join(code.matrix) or 'none'}")
    if compiled.absent:
        found.append(f"{where}: no {', '.join(compiled.absent)} in the PTX: a NaN would become a number")
    if compiled.remarks or (code.loop is not None and code.loop.serialized):
        counts = "" if code.loop is None else f"; {code.loop.waits} waits for {code.loop.matrix}"
        found.append(
            f"{where}: matrix instructions are serialized ({', '.join(compiled.remarks) or 'no remark'}{counts}): peel "
            "what is left over of whole tiles (`form` in the launch table), or choose another tile"
        )
    if resident_programs(case, compiled) < 1:
        found.append(
            f"{where}: {code.registers} registers and {compiled.shared_bytes} bytes of shared memory do not fit"
        )
    if compiled.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        found.append(f"{where}: {compiled.tensor_memory_columns} columns of tensor memory, there are 512")
    return found


def differences(recorded: dict[Job, Row], rows: dict[Job, Row]) -> list[Difference]:
    """What is worse than recorded, for the rows that were compiled; a row the table does not have is one too."""
    found = []
    for (kernel, arch), row in rows.items():
        was = recorded.get((kernel, arch))
        if was is None:
            found.append(Difference(kernel, arch, "row", "absent", "compiled"))
            continue
        for what, slack in SLACK.items():
            before, now = was.get(what) or 0, row.get(what) or 0
            if now > before + (slack if slack >= 1 else slack * before):
                found.append(Difference(kernel, arch, what, before, now))
        for what in ("tile", "warps", "stages", "form"):
            if was.get(what) != row.get(what):
                found.append(Difference(kernel, arch, what, was.get(what), row.get(what)))
        if set(was["matrix"]) != set(row["matrix"]):
            found.append(Difference(kernel, arch, "matrix opcodes", sorted(was["matrix"]), sorted(row["matrix"])))
    return found


def changed(cases: Iterable[CompileCase], recorded: dict[Job, Row], wanted: Iterable[Job]) -> list[Job]:
    """The wanted jobs whose source is not the one that the table recorded; a new job is among them.

    Raises ValueError where kernels were decorated for the interpreter.
    """
    named = {case.name: case for case in cases}
    return [job for job in wanted if source_key(named[job[0]], job[1]) != recorded.get(job, {}).get("source")]


def vanished(recorded: dict[Job, Row], all_jobs: Iterable[Job]) -> list[Difference]:
    """Rows of the table whose case or launch choice no longer exists."""
    gone = set(recorded) - set(all_jobs)
    return [Difference(kernel, arch, "row", "recorded", "gone") for kernel, arch in sorted(gone)]


def load(path: Path = REPORT) -> dict[Job, Row]:
    """The recorded rows.

    Raises ValueError if another version of Triton made the table: its compiler is a part of what is recorded.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    installed = metadata.version("triton")
    if report["triton"] != installed:
        raise ValueError(f"{path.name} was made with triton {report['triton']}, here is {installed}; run `{REFRESH}`")
    rows = report["kernels"]
    return {(kernel, int(arch[3:])): row for kernel, by_arch in rows.items() for arch, row in by_arch.items()}


def save(rows: dict[Job, Row], path: Path = REPORT) -> None:
    """Write the table, one row a line, so that a review shows the lines of what changed."""
    kernels: dict[str, list[str]] = {}
    for (kernel, arch), row in sorted(rows.items()):
        kernels.setdefault(kernel, []).append(f"   {json.dumps(f'sm_{arch}')}: {json.dumps(row)}")
    blocks = [f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }" for kernel, lines in kernels.items()]
    head = f'{{\n "made by": "{REFRESH}",\n "triton": "{metadata.version("triton")}",\n "kernels": {{\n'
    write_text(path, head + ",\n".join(blocks) + "\n }\n}\n")
