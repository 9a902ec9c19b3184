"""`search(pipe, objective, budget)`: the recipe that is fastest within a loss, for one pipeline and its run.

    found = diffusion_opt.search(pipe, Objective.for_pipeline(pipe), Budget(trials=60), run=Run(prompts))
    found.pick.recipe.save("fast.json")

Three things are made small at once: cost, loss, bytes of weights. Trials are cheap (`trial.py`: few samples, exact
arithmetic, the search's judge), the front's survivors are measured in full by another judge on held-out noise
(`verdict.py`), and the pick is the cheapest survivor that the search puts within the tolerance. Whether the verdict
agrees is said, and not made so: if it does not, the fastest recipe of which it does is named beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusion_opt.recipes.recipe import Recipe
from diffusion_opt.recipes.search.goal import Budget, Objective
from diffusion_opt.recipes.search.space import Space
from diffusion_opt.recipes.search.study import LOOK, POINT, about, front, go_on, opened
from diffusion_opt.recipes.search.trial import Bench
from diffusion_opt.recipes.search.verdict import TEACHER, Survivor, measured
from diffusion_opt.subjects import Run

STUDY = "study.journal"


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: the survivors with their verdict, and every trial that was looked at."""

    survivors: tuple[Survivor, ...]  # the teacher first
    trials: tuple[dict[str, Any], ...]  # recipe, macs, seconds, loss, weight_bytes, or why it was refused
    refused: Mapping[str, str]  # techniques that are no part of the space, and why
    objective: Objective
    budget: Budget

    @property
    def pick(self) -> Survivor:
        """The cheapest recipe that the search's judge puts within the tolerance; the verdict had no say in it."""
        chosen = [one for one in self._searched if one.search_loss <= self.objective.tolerance]
        return max(chosen, key=lambda one: one.faster, default=self.survivors[0])

    @property
    def confirmed(self) -> bool:
        """Whether the other judge, on held-out noise, puts the pick within the tolerance too."""
        return self.pick.loss <= self.objective.tolerance

    @property
    def fastest_confirmed(self) -> Survivor:
        """The cheapest of which both judges say so. It was chosen by the verdict, which therefore flatters it."""
        both = [one for one in self._searched if max(one.loss, one.search_loss) <= self.objective.tolerance]
        return max(both, key=lambda one: one.faster, default=self.survivors[0])

    @property
    def _searched(self) -> list[Survivor]:
        return [one for one in self.survivors if one.search_loss is not None]


def search(
    pipe: DiffusionPipeline,
    objective: Objective | None = None,
    budget: Budget | None = None,
    *,
    run: Run | None = None,
    beside: Mapping[str, Recipe] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Found:
    """Search recipes for a pipeline and the user's run; `beside` are measured with the survivors, unsearched.

    With a `folder` the study is a file there, and a later call with the same settings goes on with it. The pipeline is
    left as it was. Raises ValueError for a pipeline with a recipe on it, a study of another search, and as `Run`,
    `Space.of` and the judges do.
    """
    run = run or Run.for_pipeline(pipe)
    run.check(pipe)
    budget, objective = budget or Budget(), objective or Objective.for_pipeline(pipe)
    clash = [name for name in beside or () if name == TEACHER or name.startswith("found ")]
    if clash:
        raise ValueError(f"{clash[0]!r} is a name that the search gives itself: call that recipe something else")
    space = Space.of(pipe, run, objective.students)
    path = None
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / STUDY
    with opened(path, about(pipe, run, objective, space, budget)) as study:
        bench = Bench(pipe, run, objective, budget.samples)
        go_on(
            study, space, lambda point: bench.look(space.recipe(point)), lambda look: look.cost(objective), budget,
            progress,
        )  # fmt: skip
        chosen = front(study, budget.survivors, objective.tolerance)
        trials = tuple(_told(trial, space) for trial in study.trials if trial.state.is_finished())
        recipes = {
            f"found {place}": (space.recipe(trial.user_attrs[POINT]), trial.values[1])
            for place, trial in enumerate(chosen, 1)
        }
    recipes |= {name: (recipe, None) for name, recipe in (beside or {}).items()}
    survivors = measured(pipe, recipes, run, objective, budget, progress)
    return Found(tuple(survivors), trials, space.refused, objective, budget)


def _told(trial: Any, space: Space) -> dict[str, Any]:
    """A trial as plain data."""
    recipe = space.recipe(trial.user_attrs[POINT]) if LOOK in trial.user_attrs else None
    told = {"point": trial.user_attrs[POINT], "recipe": None if recipe is None else recipe.describe()}
    return told | trial.user_attrs.get(LOOK, {"refused": trial.user_attrs.get("refused")})


__all__ = ["Budget", "Found", "Objective", "Space", "search"]
