"""`diffusion-opt train` and `diffusion-opt distill`: make the teacher and its students."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffusion_opt.cli.options import RUNS, Device, settle, writable


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

    device = settle(device, threads)
    from diffusion_opt.distillation.make import TEACHERS, make_teacher

    config = replace(TEACHERS[model], seed=seed)
    if minutes is not None or steps is not None:
        config = replace(config, minutes=minutes, steps=steps)
    out = out or RUNS / f"teacher-{model}"
    writable(out)
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

    device = settle(device, threads)
    from diffusion_opt.distillation.make import MATCHED, PAIRS, STUDENTS, make_matched_student, make_student
    from diffusion_opt.models import load

    if method == "dmd2" and steps != 1:
        raise ValueError(f"--method dmd2 makes one-step students, got --steps {steps}")
    preset = STUDENTS[steps] if method == "ode" else MATCHED
    config = replace(preset, seed=seed, minutes=minutes or preset.minutes)
    guidance = guidance or load(teacher).config.default_guidance
    name = Path(teacher).name
    out = out or RUNS / (f"{name}-{steps}step" + ("-dmd2" if method == "dmd2" else ""))
    writable(out)
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
