"""`diffusion-opt cache`: calibrate the rules of step caches, search schedules, and compare everything at equal cost.

    diffusion-opt cache calibrate fashion          what TeaCache, MagCache and the step table need
    diffusion-opt cache search fashion             masks under a budget, and the error bound
    diffusion-opt cache compare fashion            every cache and both honest baselines in one table

All of them take a shipped name, a folder or a hub name, and write small JSON files that refuse other models and runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffusion_opt.cli.options import RUNS, Device, settle, writable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_opt.caching.schedules.search import Mask
    from diffusion_opt.subjects import Run

Model = Annotated[str, tyro.conf.Positional]
PredictorChoice = Literal["reuse", "forecast", "quadratic", "hermite"]


def calibrate(
    model: Model = "fashion",
    prompts: tuple[str, ...] = (),
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    out: Path = RUNS / "caching",
    threads: int | None = None,
    device: Device = "auto",
) -> None:
    """Record a few generations and fit what TeaCache, MagCache and the step table need.

    Prints how well the input's change explains the output's (R2), beside a control that looks at nothing but the step.
    Writes <model>-calibration.json, which `TeaCache(threshold, curve=…)` and `MagCache(threshold, …)` read.

    Args:
        model: shipped name, folder or hub name.
        prompts: to record; default: each class of a shipped model once.
        steps: of the run it is for; default: the model's own.
        guidance: of the run it is for; default: the model's own.
        seed: of the noise.
        out: folder for the JSON file.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to run; auto takes the GPU if there is one.
    """
    writable(out)
    pipe, run = _opened(model, prompts, steps, guidance, seed, settle(device, threads))
    from diffusion_opt.caching import calibrate_step_cache

    found = calibrate_step_cache(pipe, run)
    path = out / f"{Path(model).name}-calibration.json"
    found.save(path)
    print(f"{found.describe()}\nwritten to {path}")


def search(
    model: Model = "fashion",
    budgets: tuple[int, ...] = (20, 15, 10, 7),
    predictor: PredictorChoice = "forecast",
    prompts: tuple[str, ...] = (),
    steps: int | None = None,
    guidance: float | None = None,
    trials: int = 40,
    max_gap: int = 12,
    held_out: int = 20,
    bound_samples: int = 0,
    bound_budgets: tuple[int, ...] = (40, 30, 25),
    seed: int = 0,
    out: Path = RUNS / "caching",
    threads: int | None = None,
    device: Device = "auto",
) -> None:
    """Search which steps to compute, for each budget: dynamic programming, then a climb on whole runs.

    Run it again and the climb goes on from the schedules in the folder.
    Writes <model>-<budget>.json for `ScheduledCache(schedule=…)`, with its error on samples the search never saw, and
    with --bound-samples also <model>-error-bound.json for `ErrorBoundedCache(max_rel_error, confidence, …)`.

    Args:
        model: shipped name, folder or hub name.
        budgets: steps to compute; one schedule for each.
        predictor: what stands in for a skipped step.
        prompts: to search with; default: each class of a shipped model once.
        steps: of the full run; default: the model's own.
        guidance: of the run; default: the model's own.
        trials: whole runs of the climb for each budget; 0: dynamic programming alone.
        max_gap: most steps from one computed step to the next.
        held_out: samples for the error that is reported; 0: none.
        bound_samples: samples that calibrate the error bound, 9 or more for confidence 0.9; 0: make none.
        bound_budgets: further schedules for the bound to choose from, by dynamic programming alone.
        seed: of noise and climb; the noise of held-out samples and of the bound is drawn from seeds far from it.
        out: folder for the JSON files.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to run; auto takes the GPU if there is one.
    """
    writable(out)
    pipe, run = _opened(model, prompts, steps, guidance, seed, settle(device, threads))
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

    others = tuple(n for n in bound_budgets if n not in budgets) if bound_samples else ()
    for budget in (*budgets, *others):
        check_budget(budget, steps_of(pipe, run), max_gap)
    paths = {budget: out / f"{Path(model).name}-{budget}.json" for budget in budgets}
    settings = SearchSettings(predictor, max_gap=max_gap, trials=trials, seed=seed)
    task = GenerationTask(run, tuple(range(len(run.prompts))))
    unseen = generation_tasks(run, held_out, first=HELD_OUT) if held_out else ()
    costs = None
    if others or not all(path.is_file() for path in paths.values()):
        costs = measure_costs(pipe, [task], settings, progress=True)
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
    budgets: tuple[int, ...] = (20, 15, 10, 7),
    samples: int = 20,
    seed: int = 30_000,
    out: Path = RUNS / "caching",
    threads: int | None = None,
    device: Device = "auto",
) -> None:
    """Every cache at equal cost beside the honest baselines: fewer steps of the same solver, and of a better one.

    Args:
        model: shipped name, folder or hub name.
        budgets: evaluations to compare at.
        samples: images behind each error.
        seed: of the noise; keep it away from the seed of a search.
        out: folder for the JSON file.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to run; auto takes the GPU if there is one.
    """
    writable(out)
    pipe, run = _opened(model, (), None, None, 0, settle(device, threads))
    from rich.console import Console

    from diffusion_opt.caching.comparison import compare as comparison

    result = comparison.compare(pipe, budgets=budgets, num_samples=samples, seed=seed, run=run)
    path = out / f"{Path(model).name}-comparison.json"
    result.save(path)
    Console().print(result.table())
    print(f"written to {path}")


def _opened(
    model: str, prompts: tuple[str, ...], steps: int | None, guidance: float | None, seed: int, device: str
) -> "tuple[DiffusionPipeline, Run]":
    """The pipeline and its run, with the model's own defaults. Raises ValueError for what it does not know."""
    from diffusion_opt.models import load
    from diffusion_opt.subjects import Run

    pipe = load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "seed": seed, "batch_size": 10}
    return pipe, Run.for_pipeline(pipe, prompts, **settings)


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
