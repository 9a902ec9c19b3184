"""`diffusion-opt kernels`: which attention code runs here, and what each kernel compiles to on any GPU."""

from typing import TYPE_CHECKING, Any, Literal

from diffusion_opt.cli.options import Device, settle

if TYPE_CHECKING:
    from rich.table import Table


def report(
    update: bool = False,
    changed: bool = False,
    only: str | None = None,
    arch: int | None = None,
    workers: int | None = None,
) -> None:
    """Compile every kernel for sm_80, 89, 90, 100 and 120 and compare with the committed table; no GPU needed.

    Prints registers, spills, shared memory in KiB, programs that fit on an SM, matrix opcodes, waits for asynchronous
    ones in the main loop (sm_90), matrix work relative to what the operation needs, and the static roofline: the share
    of the peak reached if nothing overlapped. Exit code 1 if a kernel spills, misses an opcode, waits for each matrix
    instruction, loses NaN, or got worse than recorded.

    Args:
        update: write what was compiled into the table.
        changed: compile the kernels whose source, constants or launch options are not those of the table.
        only: compile cases whose name contains this.
        arch: compile for this architecture.
        workers: compiler processes at a time; default: one for each core, at most 8.
    """
    from rich.console import Console

    from diffusion_opt.kernels.gate import report as compile_report
    from diffusion_opt.kernels.gate.cases import all_cases

    cases = all_cases()
    every = compile_report.jobs(cases)
    wanted = [job for job in compile_report.jobs(cases, arch) if only is None or only in job[0]]
    if not wanted:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"no case is left by --only {only} --arch {arch}; there are: {names}")
    if changed:
        wanted = compile_report.changed(cases, compile_report.load(), wanted)
    rows, wrong = _compiled(cases, wanted, workers)
    console = Console()
    console.print(table(rows))
    for problem in wrong:
        console.print(problem, markup=False, highlight=False)
    if update:
        partial = len(wanted) < len(every) and compile_report.REPORT.is_file()
        kept = compile_report.load() if partial else {}
        compile_report.save({job: row for job, row in {**kept, **rows}.items() if job in every})
        console.print(f"Written: {compile_report.REPORT.name}")
        raise SystemExit(1 if wrong else 0)
    recorded = compile_report.load()
    worse = [*compile_report.differences(recorded, rows), *compile_report.vanished(recorded, every)]
    for difference in worse:
        console.print(str(difference), markup=False, highlight=False)
    if worse:
        console.print(f"If this is intended: {compile_report.REFRESH}", markup=False)
    raise SystemExit(1 if wrong or worse else 0)


def explain(
    head_dim: int = 128, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16", device: Device = "auto"
) -> None:
    """Say for each precision which code attention runs on this machine, and why.

    Args:
        head_dim: numbers of a head; 128 in FLUX.2, LTX-2 and Wan.
        dtype: type of q, k and v.
        device: where they lie; auto takes the GPU if there is one.
    """
    device = settle(device, None)
    import torch

    from diffusion_opt.kernels.attention import LOW_PRECISION
    from diffusion_opt.kernels.attention import explain as reason

    q = torch.empty(1, 1, 128, head_dim, dtype=getattr(torch, dtype), device=device)
    for precision in ("dense", *LOW_PRECISION):
        try:
            print(reason(q, q, q, precision=precision))
        except ValueError as error:
            print(f"{precision} attention: not possible: {error}")


def _compiled(cases: Any, wanted: list, workers: int | None) -> tuple[dict, list[str]]:
    """Compile behind a progress bar."""
    from tqdm import tqdm

    from diffusion_opt.evaluation.machine import usable_cores
    from diffusion_opt.kernels.gate.report import compile_rows

    workers = workers or min(8, usable_cores())
    with tqdm(total=len(wanted), desc="compile", unit="kernel", disable=None) as bar:
        return compile_rows(cases, wanted, workers, lambda _: bar.update())


def table(rows: dict) -> "Table":
    """The rows for a terminal, in the words of `kernels/gate/report.py`."""
    from rich.table import Table

    shown = Table(
        "kernel",
        "sm",
        "tile",
        "warps",
        "regs",
        "spills",
        "KiB",
        "per SM",
        "instr",
        "opcodes",
        "waits",
        "work",
        "serial",
        "bound",
    )
    for (kernel, arch), row in rows.items():
        opcodes = " ".join(f"{name} {count}" for name, count in row["matrix"].items())
        tile = "x".join(map(str, row["tile"]))
        shown.add_row(
            kernel, str(arch), tile, str(row["warps"]), str(row["registers"]), str(row["spills"]),
            f"{row['shared_bytes'] / 1024:.0f}", str(row["programs_per_sm"]), str(row["instructions"]), opcodes,
            str(row.get("waits", "")),
            *("" if row.get(what) is None else f"{row[what]:.2f}" for what in ("matrix_work", "serial")),
            row.get("bound_by", ""),
        )  # fmt: skip
    return shown
