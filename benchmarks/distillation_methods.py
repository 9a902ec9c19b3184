"""Every distillation method on one small teacher at one budget: `benchmarks/results/distillation_methods.json`.

    python benchmarks/distillation_methods.py                    all rows that the results lack
    python benchmarks/distillation_methods.py --only flow_map    some of them, by the beginning of their names

The teacher is `fashion-micro` with guidance 1.5. A row is a student made within `--budget` seconds of CPU time of one
thread; making trajectories and the student that a method starts from counts, loading files and measuring does not. The
results hold, for each step count that the student serves, FD (fashion features), KID, precision, recall and class
agreement of 2,000 samples, and what was spent: training images, optimizer steps, updates of the student, CPU seconds.
Beside the methods stand the teacher itself with few steps, two passes each; failures, which are methods with one
setting made wrong; and students at other budgets. A row that is there is not made again; one that was interrupted goes
on from its folder below `runs/distillation-methods/`.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from diffusion_opt.distillation import builders
from diffusion_opt.distillation.distribution import Alarms
from diffusion_opt.distillation.make import StudentPlan, make_student
from diffusion_opt.distillation.methods import METHODS, Method
from diffusion_opt.distillation.trajectory import METHODS as SETTINGS
from diffusion_opt.distillation.trajectory import PairConfig, generate_pairs
from diffusion_opt.evaluation import Quality, machine, quality
from diffusion_opt.models import TinyFlux2Pipeline, load
from diffusion_opt.recipes import Solver
from diffusion_opt.subjects import ClassConditional
from diffusion_opt.training import TrainConfig

PATH = Path(__file__).parent / "results" / "distillation_methods.json"
RUNS = Path("runs/distillation-methods")
TEACHER, GUIDANCE = "fashion-micro", 1.5
PAIRS_A_SECOND = 16  # of the budget: on one core their making then takes about a third of it
START_SHARE = 0.4  # of the budget, for the student that a method starts from
START_STEPS = {"ode": 1, "flow_map": 4}
MEASURED = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Row:
    """A student to make and measure."""

    name: str
    method: str
    steps: int
    start: str | None = None  # method of the student to start from, or TEACHER
    group: str = "method"
    guidance: float = GUIDANCE
    budget: float = 1.0  # in units of --budget
    seed: int = 0
    vary: Callable[[Method], Method] | None = None  # a setting made different
    num_images: int | None = None
    classes: tuple[str, ...] = ()


def with_build(build: Callable[[builders.Task], Any]) -> Callable[[Method], Method]:
    """A method that differs in how its distiller is made."""
    return lambda method: replace(method, build=build)


def matching(**options: Any) -> Callable[[Method], Method]:
    """DMD2 with other options, and no alarm to stop it."""

    def build(task: builders.Task) -> Any:
        return replace(builders.matching(task), alarms=Alarms(max_lag=None), **options)

    return with_build(build)


SCM_BY_DIFFERENCES = with_build(builders.flow_map_with(replace(SETTINGS["scm"], hop="difference")))
FEW_ENDS = with_build(builders.flow_map_with(replace(SETTINGS["flow_map"], share_end=0.11, share_same=0.59)))
ROWS = (
    Row("flow_map", "flow_map", 4),
    Row("ode, 1 step", "ode", 1),
    Row("dmd2 from ode, 1 step", "dmd2", 1, "ode"),
    Row("progressive", "progressive", 1),
    Row("consistency", "consistency", 4),
    Row("dmd2 from flow_map, 4 steps", "dmd2", 4, "flow_map"),
    Row("reflow", "reflow", 4),
    Row("dmd2 from flow_map, 1 step", "dmd2", 1, "flow_map"),
    Row("dmd2, fake score held", "dmd2", 1, "ode", "failure", vary=matching(fake_updates=0, fake_rate=1.0)),
    Row("dmd2, one for one, one rate", "dmd2", 1, "ode", "variant", vary=matching(fake_updates=1, fake_rate=1.0)),
    Row("consistency_training", "consistency_training", 4),
    Row("mean_flow", "mean_flow", 4, None, "failure"),  # the exact derivative of a fine embedding of time
    Row("f_distill from ode, 1 step", "f_distill", 1, "ode"),
    Row("sid from ode, 1 step", "sid", 1, "ode"),
    Row("mean_flow by differences", "mean_flow_difference", 4),
    Row("scm by differences", "scm", 4, vary=SCM_BY_DIFFERENCES),
    Row("flow_map, 11 % of jumps to 0", "flow_map", 4, None, "failure", vary=FEW_ENDS),
    Row("dmd2, guidance 4", "dmd2", 1, "ode", "failure", guidance=4.0, vary=matching()),
    Row("rcm from flow_map, 4 steps", "rcm", 4, "flow_map"),
    Row("dmd2_gan from ode, 1 step", "dmd2_gan", 1, "ode"),
    Row("ladd from ode, 1 step", "ladd", 1, "ode"),
    Row("shortcut", "shortcut", 4),
    Row("scm", "scm", 4, None, "failure"),
    Row("dmd2 from the teacher, 1 step", "dmd2", 1, TEACHER, "failure", vary=matching()),
    Row("ode, 4 steps", "ode", 4),
    Row("mean_flow_data", "mean_flow_data", 4),
    Row("lcm", "lcm", 4),
    Row("rcm from flow_map, 1 step", "rcm", 1, "flow_map"),
    Row("dmd2 from ode, 1 step, seed 1", "dmd2", 1, "ode", seed=1),
    Row("flow_map, seed 1", "flow_map", 4, seed=1),
    *(
        Row(f"{name}, {budget:g} x the budget", method, steps, start, "budget", budget=budget)
        for budget in (0.25, 0.5, 2.0)
        for name, method, steps, start in (
            ("flow_map", "flow_map", 4, None),
            ("ode, 1 step", "ode", 1, None),
            ("dmd2 from ode, 1 step", "dmd2", 1, "ode"),
        )
    ),
)  # fmt: skip


def train_config(method: Method, steps: int, seconds: float, seed: int) -> TrainConfig:
    """The method's preset for so many CPU seconds: shorter averages, and for this smaller network a higher rate."""
    matched = method.kind == "distribution"
    return replace(
        method.presets[steps],
        steps=None,
        minutes=seconds / 60,
        clock="process",
        seed=seed,
        warmup_steps=20,
        ema_decay=0.98 if matched else 0.99,
        learning_rate=2e-4 if matched else 5e-4,
        log_every=10,
    )


def trajectories(row: Row, seconds: float) -> tuple[PairConfig, Path, float]:
    """Make the trajectories of a run of so many seconds, once; their settings, folder and CPU seconds."""
    number = max(64, int(PAIRS_A_SECOND * seconds))
    config = PairConfig(number, GUIDANCE, num_rungs=4, num_steps=12, seed=row.seed)
    folder = RUNS / f"pairs-{number}-seed{row.seed}"
    spent = folder / "cpu_seconds.json"
    if not spent.is_file():
        subject, start = ClassConditional.open(TEACHER), time.process_time()
        generate_pairs(
            subject.guided, subject.sample_shape, subject.conditions, config, folder,
            source=subject.identity(), progress=False,
        )  # fmt: skip
        spent.write_text(json.dumps(time.process_time() - start))
    return config, folder, json.loads(spent.read_text())


def make(row: Row, seconds: float, folder: Path) -> dict[str, float]:
    """Make the student of a row within so many CPU seconds in `folder`; returns what was spent.

    A start is shared by all rows that ask for the same one, and its cost charged to each.
    """
    done = folder / "spent.json"
    if done.is_file():
        return json.loads(done.read_text())
    method = METHODS[row.method] if row.vary is None else row.vary(METHODS[row.method])
    before = {"cpu_s": 0.0, "images": 0, "optimizer_steps": 0}
    start, pairs, pairs_folder = row.start, None, None
    if row.start is not None and row.start != TEACHER:
        first = Row(row.start, row.start, START_STEPS[row.start], seed=row.seed)
        where = folder.parent / f"start-{row.start}-{START_SHARE * seconds:.0f}s-seed{row.seed}"
        before = make(first, START_SHARE * seconds, where)
        start = str(where / "pipeline")
    if method.pairs:
        pairs, pairs_folder, spent = trajectories(row, seconds)
        before = {**before, "cpu_s": before["cpu_s"] + spent}
    guidance = row.guidance if method.guided else None
    plan = StudentPlan(TEACHER, row.method, row.steps, guidance, start, pairs, row.num_images, row.classes)
    config = train_config(method, row.steps, seconds - before["cpu_s"], row.seed)
    _, result = make_student(plan, config, folder, pairs_folder, progress=False, method=method)
    if not result.finished and result.alarm is None:
        raise SystemExit(f"{row.name} was interrupted; run the same command to go on")
    spent = {
        "cpu_s": before["cpu_s"] + result.seconds,
        "images": before["images"] + result.images,
        "optimizer_steps": before["optimizer_steps"] + result.step,
    }
    if method.stages:
        others = [json.loads(path.read_text()) for path in folder.glob("steps-*/checkpoint/state.json")]
        steps = sum(state["step"] for state in others)
        spent = {"cpu_s": sum(state["seconds"] for state in others), "images": 64 * steps, "optimizer_steps": steps}
    done.write_text(json.dumps(spent))
    return spent


def sampled(pipe: TinyFlux2Pipeline, steps: int, samples: int, batch_size: int) -> Quality:
    """Quality of balanced samples, the same noise for all."""
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(samples) % 10
    images = [
        pipe(part.tolist(), steps, generator=torch.Generator().manual_seed(i), output_type="pt").images * 2 - 1
        for i, part in enumerate(labels.split(batch_size))
    ]
    return quality(torch.cat(images), labels)


def figures(found: Quality) -> dict[str, float]:
    """The numbers of a row."""
    return {
        "distance": found.distance,
        "distance_low": found.distance_low,
        "distance_high": found.distance_high,
        "kernel_distance": found.kernel_distance,
        "precision": found.precision,
        "recall": found.recall,
        "class_agreement": found.class_agreement,
    }


def served(pipe: TinyFlux2Pipeline, folder: Path) -> Iterator[tuple[int, TinyFlux2Pipeline]]:
    """Which of the measured step counts a student serves, and the pipeline for each."""
    for steps in MEASURED:
        stage = folder / f"steps-{steps}" / "pipeline"
        if stage.is_dir():
            yield steps, load(stage)
        elif pipe.config.ladders is None or steps in map(len, pipe.config.ladders):
            yield steps, pipe


def measure(row: Row, budget: float, samples: int, batch_size: int) -> dict[str, Any]:
    """Make the student of a row and measure it."""
    folder = RUNS / f"{budget:g}s" / re.sub(r"\W+", "-", row.name)
    spent = make(row, budget * row.budget, folder)
    method, pipe = METHODS[row.method], load(folder / "pipeline")
    state = json.loads((folder / "checkpoint" / "state.json").read_text()) if not method.stages else {}
    return {
        "name": row.name,
        "group": row.group,
        "method": row.method,
        "kind": method.kind,
        "images_used": method.images,
        "start": row.start,
        "guidance": row.guidance,
        "budget_s": budget * row.budget,
        "seed": row.seed,
        **spent,
        "student_updates": state.get("ema_updates", spent["optimizer_steps"]),  # in the last stage
        "steps": {str(n): figures(sampled(p, n, samples, batch_size)) for n, p in served(pipe, folder)},
    }


def teacher_rows(samples: int, batch_size: int, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """The teacher with few steps: two passes each."""
    for steps in (1, 2, 4, 8, 50):
        for solver in ("euler", "adams_bashforth2") if steps > 1 else ("euler",):
            name = f"teacher, {steps} {solver} steps"
            if wanted(name):
                pipe = Solver(steps, solver).apply(load(TEACHER))
                pipe.register_to_config(default_guidance=GUIDANCE)
                line = {"name": name, "group": "teacher", "solver": solver, "passes": 2 * steps}
                yield line | {"steps": {str(steps): figures(sampled(pipe, steps, samples, batch_size))}}


def main(
    budget: float = 60,
    samples: int = 2000,
    batch_size: int = 200,
    only: tuple[str, ...] = (),
    results: Path = PATH,
) -> None:
    """Make and measure what the results lack.

    Args:
        budget: CPU seconds of one thread for a student.
        samples: images behind each figure.
        batch_size: images a call when sampling.
        only: beginnings of the names of the rows to make; none: all.
        results: the file to fill.
    """
    torch.set_num_threads(1)
    report = json.loads(results.read_text()) if results.is_file() else {"rows": []}
    settings = {"teacher": TEACHER, "guidance": GUIDANCE, "budget_s": budget, "samples": samples}
    if report["rows"] and any(report[name] != value for name, value in settings.items()):
        raise SystemExit(f"{results} holds rows of another protocol than {settings}; move it away to start anew")
    report |= settings | {"machine": machine()}

    def add(line: dict[str, Any]) -> None:
        report["rows"].append(line)
        results.write_text(json.dumps(report, indent=2) + "\n")
        print(line["name"], {n: round(found["distance"], 2) for n, found in line["steps"].items()}, flush=True)

    def wanted(name: str) -> bool:
        return (not only or name.startswith(only)) and name not in {line["name"] for line in report["rows"]}

    for row in ROWS:
        if wanted(row.name):
            add(measure(row, budget, samples, batch_size))
    for line in teacher_rows(samples, batch_size, wanted):
        add(line)


if __name__ == "__main__":
    tyro.cli(main)
