"""The survivors of a search under the full protocol: together, in turns, on noise the search never saw, another judge.

Each survivor gets a copy of the denoising networks; text encoders, VAE and the rest are shared. What the search liked
is reported beside what the verdict says, so a recipe that was only lucky in the search is seen.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.datasets.writing import write_json
from diffusion_opt.evaluation import Measurement, measure_together, speedup
from diffusion_opt.recipes.measuring import as_rung, run_under
from diffusion_opt.recipes.recipe import Recipe
from diffusion_opt.recipes.search.goal import Budget, Objective, loss
from diffusion_opt.subjects import Run, denoisers

HELD_OUT = 500_000  # added to the seed: noise that no trial saw
TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Survivor:
    """A recipe of the front: what the search said, and what the verdict says."""

    name: str
    recipe: Recipe
    search_loss: float | None  # None: it did not come from the search
    measured: Measurement
    loss: float  # of the verdict's judge, on held-out noise
    loss_high: float  # upper end of its 95 % interval, the teacher's taken as exact
    faster: float  # times the teacher, arithmetic or time as the objective says
    seconds_faster: float

    def row(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name, "recipe": self.recipe.describe(), "search_loss": self.search_loss, "loss": self.loss,
            "loss_high": self.loss_high, "faster": self.faster, "seconds_faster": self.seconds_faster,
            "macs": self.measured.macs, "ms_per_sample": self.measured.ms_per_image,
            "weight_bytes": self.measured.weight_bytes,
            "judged": {name: number.to_dict() for name, number in self.measured.judged.items()},
        }  # fmt: skip


def measured(
    pipe: DiffusionPipeline,
    recipes: Mapping[str, tuple[Recipe, float | None]],
    run: Run,
    objective: Objective,
    budget: Budget,
    progress: bool = True,
) -> list[Survivor]:
    """The teacher and the recipes (with their loss in the search) under one protocol; the teacher comes first."""
    pipes = {TEACHER: pipe}
    for name, (recipe, _) in recipes.items():
        pipes[name] = recipe.apply(with_own_networks(pipe))
    unseen = replace(run, seed=run.seed + HELD_OUT)
    found = measure_together(
        {name: as_rung(one, run_under(one, unseen)) for name, one in pipes.items()},
        num_samples=budget.verdict_samples,
        batch_size=run.batch_size,
        prompts=run.prompts,
        rounds=budget.rounds,
        seed=unseen.seed,
        device=next(next(iter(denoisers(pipe).values())).parameters()).device.type,
        judges=tuple(dict.fromkeys(name.partition(".")[0] for name in (objective.verdict, objective.judge))),
        real=objective.real,
        progress=progress,
    )
    known = {TEACHER: (Recipe(), 0.0), **recipes}
    return [_survivor(name, *known[name], found, objective) for name in found]


def with_own_networks(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A copy with denoising networks of its own; the other parts are the same objects."""
    shared = [part for name, part in pipe.components.items() if name not in denoisers(pipe)]
    memo = {id(part): part for part in shared if isinstance(part, nn.Module)}
    return copy.deepcopy(pipe, memo)


def _survivor(
    name: str, recipe: Recipe, search_loss: float | None, found: Mapping[str, Measurement], objective: Objective
) -> Survivor:
    teacher, mine = found[TEACHER], found[name]
    number = mine.judged.get(objective.verdict)
    theirs = teacher.judged.get(objective.verdict)
    lost = 0.0 if number is None else loss(objective.verdict, number, theirs)  # the teacher has no paired number
    high = lost if number is None else loss(objective.verdict, replace(number, value=number.high), theirs)
    time = speedup(teacher, mine)
    arithmetic = teacher.macs / mine.macs
    return Survivor(name, recipe, search_loss, mine, lost, high, arithmetic if objective.cost == "macs" else time, time)


def write_recipes(survivors: list[Survivor], folder: Path) -> None:
    """Each recipe as a file of its own."""
    for survivor in survivors:
        if survivor.recipe.techniques:
            write_json(folder / f"{survivor.name}.json", survivor.recipe.to_dict())
