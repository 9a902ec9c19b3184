"""`diffusion-opt cache`: calibrate the rules of step caches, search schedules, and compare everything at equal cost.

    diffusion-opt cache calibrate fashion          what TeaCache, MagCache and the step table need
    diffusion-opt cache search fashion             masks under a budget, and the error bound
    diffusion-opt cache compare fashion            every cache and both honest baselines in one table
    diffusion-opt cache search DIR --prompts "a cat" --steps 28 --guidance 4 --height 512 --width 512

All of them take a shipped name, a folder or a hub name, and write small JSON files that refuse other models and runs:
what they were made for is the run that --prompts, --steps, --guidance, --height … describe.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffusion_opt.cli.options import ASKED, OPENING, RUNS, Asked, Model, Opening, writable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_opt.caching.schedules.search import Mask
    from diffusion_opt.subjects import Run

PredictorChoice = Literal["reuse", "forecast", "quadratic", "hermite"]
Budgets = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="")]
AWAY = replace(ASKED, seed=30_000)  # from the seeds of searches
SHARES = (2 / 5, 3 / 10, 1 / 5, 1 / 7)  # of the steps: budgets where none are given


def calibrate(
    model: Model = "fashion", asked: Asked = ASKED, opening: Opening = OPENING, out: Path = RUNS / "caching"
) -> None:
    """Record a few generations and fit what TeaCache, MagCache and the step table need.

    Prints how well the input's change explains the output's (R2), beside a control that looks at nothing but the step.
    Writes <model>-calibration.json, which `TeaCache(threshold, curve=…)` and `MagCache(threshold, …)` read.

    Args:
        model: shipped name, folder or hub name.
        out: folder for the JSON file.
    """
    pipe, run = _opened(model, asked, opening, out)
    from diffusion_opt.caching import calibrate_step_cache

    found = calibrate_step_cache(pipe, run)
    path = out / f"{Path(model).name}-calibration.json"
    found.save(path)
    print(f"{found.describe()}\nwritten to {path}")


def search(
    model: Model = "fashion",
    asked: Asked = ASKED,
    opening: Opening = OPENING,
    budgets: Budgets = (),
    predictor: PredictorChoice = "forecast",
    trials: int = 40,
    max_gap: int = 12,
    held_out: int = 20,
    bound_samples: int = 0,
    bound_budgets: tuple[int, ...] = (40, 30, 25),
    out: Path = RUNS / "caching",
) -> None:
    """Search which steps to compute, for each budget: dynamic programming, then a climb on whole runs.

    Run it again and the climb goes on from the schedules in the folder.
    Writes <model>-<budget>.json for `ScheduledCache(schedule=…)`, with its error on samples the search never saw, and
    with --bound-samples also <model>-error-bound.json for `ErrorBoundedCache(max_rel_error, confidence, …)`.

    Args:
        model: shipped name, folder or hub name.
        budgets: steps to compute; one schedule for each. Default: 2/5, 3/10, 1/5 and 1/7 of the steps.
        predictor: what stands in for a skipped step.
        trials: whole runs of the climb for each budget; 0: dynamic programming alone.
        max_gap: most steps from one computed step to the next.
        held_out: samples for the error that is reported; 0: none.
        bound_samples: samples that calibrate the error bound, 9 or more for confidence 0.9; 0: make none.
        bound_budgets: further schedules for the bound to choose from, by dynamic programming alone.
        out: folder for the JSON files.
    """
    pipe, run = _opened(model, asked, opening, out)
    from diffusion_opt.caching.comparison.contest import steps_of
    from diffusion_opt.caching.schedules.recording import GenerationTask, generation_tasks
    from diffusion_opt.caching.schedules.schedule import HELD_OUT, CacheSchedule, search_schedule
    from diffusion_opt.caching.schedules.search import (
        SearchSettings,
        check_budget,
        measure_costs,
        starting_masks,
        within_budget,
    )

    num_steps = steps_of(pipe, run)
    budgets = budgets or shares_of(num_steps, max_gap)
    others = tuple(n for n in bound_budgets if n not in budgets and n < num_steps) if bound_samples else ()
    for budget in (*budgets, *others):
        check_budget(budget, num_steps, max_gap)
    paths = {budget: out / f"{Path(model).name}-{budget}.json" for budget in budgets}
    settings = SearchSettings(predictor, max_gap=max_gap, trials=trials, seed=asked.seed)
    task = GenerationTask(run, tuple(range(len(run.prompts))))
    unseen = generation_tasks(run, held_out, first=HELD_OUT) if held_out else ()
    costs = None
    if others or not all(path.is_file() for path in paths.values()):
        costs = measure_costs(pipe, generation_tasks(run), settings, progress=True)
    masks = []
    for budget, path in paths.items():
        starts = (CacheSchedule.load(path).mask,) if path.is_file() else starting_masks(costs, budget)
        found = search_schedule(pipe, task, starts, settings, unseen, progress=True)
        found.save(path)
        masks.append(found.mask)
        print(found.describe(), flush=True)
    if bound_samples:
        masks += [costs.whole(within_budget(costs, budget).mask(costs.num_steps)) for budget in others]
        _bound(pipe, run, masks, predictor, bound_samples, out / f"{Path(model).name}-error-bound.json")
    print(f"written to {out}")


def compare(
    model: Model = "fashion",
    asked: Asked = AWAY,
    opening: Opening = OPENING,
    budgets: Budgets = (),
    samples: int = 20,
    only: tuple[str, ...] = (),
    out: Path = RUNS / "caching",
) -> None:
    """Every cache at equal cost beside the honest baselines: fewer steps of the same solver, and of a better one.

    Keep --seed away from that of a search, or the searched schedules meet the noise that they were made for.

    Args:
        model: shipped name, folder or hub name.
        budgets: evaluations to compare at. Default: 2/5, 3/10, 1/5 and 1/7 of the steps.
        samples: images behind each error.
        only: names of policies, to run those alone.
        out: folder for the JSON file.
    """
    pipe, run = _opened(model, asked, opening, out)
    from rich.console import Console

    from diffusion_opt.caching.comparison import compare as comparison
    from diffusion_opt.caching.comparison.contest import steps_of

    result = comparison.compare(
        pipe, budgets=budgets or shares_of(steps_of(pipe, run)), num_samples=samples, seed=asked.seed, run=run,
        only=only or None,
    )  # fmt: skip
    path = out / f"{Path(model).name}-comparison.json"
    result.save(path)
    Console().print(result.table())
    print(f"written to {path}")


def shares_of(num_steps: int, max_gap: int | None = None) -> tuple[int, ...]:
    """Budgets for a run of so many steps: the usual shares of it, as far as gaps of `max_gap` steps allow."""
    least = 2 if max_gap is None else max(2, 1 + -(-(num_steps - 1) // max_gap))
    found = {round(share * num_steps) for share in SHARES}
    return tuple(sorted((n for n in found if least <= n < num_steps), reverse=True)) or (min(least, num_steps),)


def _opened(model: str, asked: Asked, opening: Opening, out: Path) -> "tuple[DiffusionPipeline, Run]":
    """The pipeline and its run in full; what can be refused is refused before anything is opened."""
    opening.check(model)
    asked.check(model)
    writable(out)
    pipe = opening.open(model)
    return pipe, asked.run(pipe)


def _bound(
    pipe: "DiffusionPipeline",
    run: "Run",
    masks: "list[Mask]",
    predictor: PredictorChoice,
    num_samples: int,
    path: Path,
) -> None:
    """Calibrate and save the error bound, and say what it allows."""
    from diffusion_opt.caching.schedules.error_bound import calibrate_error_bound, least_samples

    bound = calibrate_error_bound(pipe, run, masks, predictor, num_samples, progress=True)
    bound.save(path)
    confidence = 0.9 if len(bound.errors) >= least_samples(0.9) else 0.5
    for allowed in (0.01, 0.02, 0.05, 0.1):
        mask = bound.mask(allowed, confidence)
        print(f"error at most {allowed:g} with confidence {confidence:g}: {sum(mask)} of {len(mask)} steps")
