"""One command from nothing: where runs lie, and the student that a method starts from.

Distribution methods move a student that makes pictures already. Asked for `dmd2` alone, `with_start` looks for one in
its usual folder, `runs/<teacher>-1step` or `runs/<teacher>-flow-map`, goes on with it if it was interrupted, and makes
it by its own preset if it is not there. It is made with the teacher's own guidance scale, as it would be by itself; the
scale that was asked for enters with the method that follows.
"""

import json
from dataclasses import replace
from pathlib import Path

from diffusion_opt.distillation.make import PIPELINE, PLAN, StudentPlan, make_student
from diffusion_opt.distillation.methods import PAIRS, method_named
from diffusion_opt.flow import ALL_TIMES
from diffusion_opt.models import load
from diffusion_opt.training import TrainConfig, processes


def usual_folder(plan: StudentPlan, runs: Path) -> Path:
    """`<teacher>-<steps>step[-<method>]`, or `<teacher>-<method>` for a student of any number of steps; both with the
    guidance scale behind if it is not the teacher's own.
    """
    method = method_named(plan.method)
    name = plan.method.replace("_", "-")
    parts = [Path(plan.teacher).name]
    if method.sampling not in ("any", "renoise"):
        parts.append(f"{plan.steps}step")
    if plan.method != "ode":
        parts.append(name)
    return runs / "-".join([*parts, *_scale(plan)])


def pairs_folder(plan: StudentPlan, runs: Path) -> Path:
    """Where the trajectories of the plan's teacher lie, shared by its students; named after what is not usual."""
    config = plan.pair_config
    number = [] if config.num_pairs == PAIRS.num_pairs else [f"n{config.num_pairs}"]
    seed = [] if config.seed == PAIRS.seed else [f"seed{config.seed}"]
    return runs / "-".join([Path(plan.teacher).name, "pairs", *_scale(plan), *number, *seed])


def _scale(plan: StudentPlan) -> list[str]:
    own = load(plan.teacher).config.default_guidance
    low, high = plan.guidance_interval
    scale = [] if plan.guidance == own else [f"g{plan.guidance:g}"]
    interval = [] if plan.guidance_interval == ALL_TIMES else [f"t{low:g}to{high:g}"]
    return scale + interval


def with_start(
    plan: StudentPlan, runs: Path, seed: int = 0, device: str = "cpu", progress: bool = True
) -> tuple[StudentPlan, bool]:
    """The plan with its start named, and whether that start is finished (False: interrupted just now)."""
    starts = method_named(plan.method).starts
    if starts is None or plan.start is not None:
        return plan, True
    name = starts[plan.steps]
    steps = plan.steps if plan.steps in method_named(name).presets else 1
    first = StudentPlan(plan.teacher, name, steps, load(plan.teacher).config.default_guidance)
    folder = usual_folder(first, runs)
    started = replace(plan, start=str(folder / PIPELINE))
    if is_finished(folder):
        return started, True
    config: TrainConfig = replace(method_named(name).presets[steps], seed=seed)
    if processes().is_main:
        print(f"{plan.method} starts from a student; first {name}, {config.minutes:g} minutes, in {folder}")
    _, result = make_student(first, config, folder, pairs_folder(first, runs), device, progress)
    return started, result.finished


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a student whose training came to its end (or one that came without its plan)."""
    if not (folder / PIPELINE / "model_index.json").is_file():
        return False
    return not (folder / PLAN).is_file() or json.loads((folder / PLAN).read_text()).get("finished", False)
