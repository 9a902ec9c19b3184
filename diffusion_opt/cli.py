"""`diffusion-opt`: one command, thin over the package's functions. `diffusion-opt --help` lists what it can do."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

Device = Literal["auto", "cpu", "cuda"]
RUNS = Path("runs")


def doctor() -> None:
    """Say what this machine has, what will be slow on it, and what to do next."""
    from diffusion_opt.doctor import diagnose, print_report

    diagnosis = diagnose()
    print_report(diagnosis)
    raise SystemExit(diagnosis.exit_code)


def demo(
    samples: int = 500,
    batch_size: int = 50,
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
    _writable(out)
    device = _settle(device, threads)
    from rich.console import Console

    from diffusion_opt.recipes import report, run_ladder

    result = run_ladder(num_samples=samples, batch_size=batch_size, seed=seed, device=device, compile=compile)
    written = report.write(result, out, f"diffusion-opt {shlex.join(sys.argv[1:])}")
    console = Console()
    console.print(report.table(written["rungs"]))
    for rung in written["rungs"]:
        console.print(f"{rung['name']}: {rung['recipe']}", highlight=False)
    for name, reason in result.skipped.items():
        console.print(f"left out: {name}: {reason}")
    console.print(f"Report: {out / 'report.html'}, picture: {out / 'ladder.png'}, data: {out / 'report.json'}")


def train(
    what: Annotated[Literal["teacher"], tyro.conf.Positional],
    model: Literal["fashion", "fashion-micro"] = "fashion",
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    threads: int | None = None,
    device: Device = "auto",
) -> None:
    """Train a teacher from scratch by flow matching; run it again to resume.

    Without a budget it uses the one that made the shipped model. A budget in steps is repeatable to the bit, one in
    minutes follows the clock. Ctrl-C saves and stops.

    Args:
        what: the teacher; students are made by `diffusion-opt distill`.
        model: size of the model.
        minutes: training time in all.
        steps: optimizer steps in all.
        seed: of weights, batches and noise.
        out: working folder; default runs/teacher-<model>.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to train; auto takes the GPU if there is one.
    """
    from dataclasses import replace

    device = _settle(device, threads)
    from diffusion_opt.distillation.make import TEACHERS, make_teacher

    config = replace(TEACHERS[model], seed=seed)
    if minutes is not None or steps is not None:
        config = replace(config, minutes=minutes, steps=steps)
    out = out or RUNS / f"teacher-{model}"
    _writable(out)
    _, result = make_teacher(model, config, out, device)
    _say(result, out)


def distill(
    steps: Literal[1, 4],
    teacher: str = "fashion",
    method: Literal["ode", "dmd2"] = "ode",
    start: str | None = None,
    minutes: float | None = None,
    pairs: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    out: Path | None = None,
    threads: int | None = None,
    device: Device = "auto",
) -> None:
    """Distill a few-step student from a teacher; run it again to resume.

    First `--method ode`, which follows the teacher's trajectories; then, for one step, `--method dmd2` can bring the
    student's distribution closer to the teacher's.

    Args:
        steps: network passes the student makes for an image.
        teacher: shipped name or folder of the teacher.
        method: ode: regression along the teacher's guided ODE trajectories; dmd2: distribution matching, one step.
        start: the one-step student that dmd2 starts from; default runs/<teacher>-1step/pipeline.
        minutes: training time in all, without the making of trajectories.
        pairs: trajectories to make.
        guidance: guidance scale that is distilled into the student; default: the teacher's own.
        seed: of trajectories and batches.
        out: working folder; default runs/<teacher>-<steps>step, with -dmd2 behind it for that method.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to train; auto takes the GPU if there is one.
    """
    from dataclasses import replace

    device = _settle(device, threads)
    from diffusion_opt.distillation.make import MATCHED, PAIRS, STUDENTS, make_matched_student, make_student
    from diffusion_opt.models import load

    if method == "dmd2" and steps != 1:
        raise ValueError(f"--method dmd2 makes one-step students, got --steps {steps}")
    preset = STUDENTS[steps] if method == "ode" else MATCHED
    config = replace(preset, seed=seed, minutes=minutes or preset.minutes)
    guidance = guidance or load(teacher).config.default_guidance
    name = Path(teacher).name
    out = out or RUNS / (f"{name}-{steps}step" + ("-dmd2" if method == "dmd2" else ""))
    _writable(out)
    if method == "ode":
        pair_config = replace(PAIRS, seed=seed, guidance_scale=guidance, num_pairs=pairs or PAIRS.num_pairs)
        _, result = make_student(teacher, steps, config, pair_config, out, RUNS / f"{name}-pairs", device)
    else:
        start = start or str(RUNS / f"{name}-1step" / "pipeline")
        _, result = make_matched_student(teacher, start, config, guidance, out, device)
    _say(result, out)


def _say(result, out: Path) -> None:
    state = "finished" if result.finished else "stopped; run the same command to go on"
    print(f"{state} after {result.step:,} steps and {result.seconds / 60:.1f} minutes; pipeline in {out / 'pipeline'}")


def _settle(device: Device, threads: int | None) -> str:
    """Set torch's threads and choose the device. Raises ValueError if a GPU was asked for and there is none."""
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no NVIDIA GPU here; leave the flag out, or see `diffusion-opt doctor`"
        )
    return device


def _writable(folder: Path) -> None:
    """Make a folder before the long work starts. Raises ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from error


COMMANDS = {
    "doctor": doctor,
    "demo": demo,
    "train": train,
    "distill": distill,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point: expected failures end in one line on standard error and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="diffusion-opt", description=__doc__, args=arguments)
    except (ValueError, OSError) as error:
        print(f"diffusion-opt: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
