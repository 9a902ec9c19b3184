"""`diffusion-opt doctor` and `diffusion-opt demo`: what this machine can do, and the whole ladder on it."""

import shlex
import sys
from pathlib import Path

from diffusion_opt.cli.options import RUNS, Device, settle, writable


def doctor(drill: bool = False) -> None:
    """Say what this machine has, what will be slow on it, and what to do next.

    Args:
        drill: also disturb a tiny training run on the disk of runs/, which takes a minute: kills, full disks, damage.
    """
    from diffusion_opt.doctor import diagnose, print_report

    diagnosis = diagnose()
    print_report(diagnosis)
    if drill:
        _drill()
    raise SystemExit(diagnosis.exit_code)


def _drill() -> None:
    """The fault drill here, and the one that is published with the repository. Raises ValueError if something broke."""
    from diffusion_opt.datasets.writing import read_json
    from diffusion_opt.doctor import ROOT
    from diffusion_opt.evaluation.drill import Outcome, table
    from diffusion_opt.training.drill import in_a_process

    writable(RUNS)
    here = in_a_process(kills=20, others=5, folder=RUNS)
    print(f"fault drill on the disk of {RUNS.resolve()}; held and refused are well\n{table(here)}")
    published = ROOT / "benchmarks" / "results" / "reliability.json"
    if published.is_file():
        sections = read_json(published, "restore it with git")["sections"].values()
        rows = [Outcome.from_dict(row) for section in sections for row in section]
        print(f"\nas published, benchmarks/results/reliability.json\n{table(rows)}")
    if wrong := sum(row.wrong for row in here):
        raise ValueError(f"{wrong} of {sum(row.tries for row in here)} disturbances had a wrong end on this disk")


def demo(
    samples: int = 500,
    batch_size: int = 50,
    rounds: int = 5,
    threads: int | None = None,
    device: Device = "auto",
    seed: int = 0,
    out: Path = RUNS / "demo",
    compile: bool = False,
) -> None:
    """Run the ladder: from the 50-step teacher with guidance to everything combined, speed and quality in one run.

    Prints the table and writes report.json, report.html and ladder.png.

    Args:
        samples: images behind each quality figure; fewer is faster and less certain.
        batch_size: images a call.
        rounds: how often each rung is timed, in turns; fewer is faster and less certain.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to run; auto takes the GPU if there is one.
        seed: of noise and bootstrap.
        out: folder for the report.
        compile: also torch.compile every rung; the first calls then take minutes.
    """
    if samples < 20:
        raise ValueError(f"--samples must be at least 20 for a quality figure, got {samples}")
    if not 1 <= batch_size <= samples:
        raise ValueError(f"--batch-size must lie in 1 … {samples} (the samples), got {batch_size}")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    writable(out)
    device = settle(device, threads)
    from rich.console import Console

    from diffusion_opt.recipes import report, run_ladder

    result = run_ladder(
        num_samples=samples, batch_size=batch_size, rounds=rounds, seed=seed, device=device, compile=compile
    )
    written = report.write(result, out, f"diffusion-opt {shlex.join(sys.argv[1:])}")
    console = Console()
    console.print(report.table(written["rungs"]))
    for rung in written["rungs"]:
        console.print(f"{rung['name']}: {rung['recipe']}", highlight=False)
    for name, reason in result.skipped.items():
        console.print(f"left out: {name}: {reason}")
    console.print(f"Report: {out / 'report.html'}, picture: {out / 'ladder.png'}, data: {out / 'report.json'}")
