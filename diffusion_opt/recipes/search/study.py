"""Trials of a search in a file: resumable, and refused to any other search.

Optuna (Akiba et al. 2019, arXiv 1907.10902) proposes points by a tree-structured Parzen estimator for several
objectives (Ozaki et al. 2020, GECCO): cost, loss, bytes of weights. Each trial is written to a journal when it ends.
The proposal of trial i depends on the seed, i and the trials before, and on nothing else, so a search that was
interrupted goes on as if it had not been.

The journal begins with what the search is about: model, run, objective, space and seed. A file of another search is
refused, because its trials would say nothing about this one.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusion_opt.models.fingerprint import identity
from diffusion_opt.recipes.search.goal import Budget, Objective
from diffusion_opt.recipes.search.space import Point, Space
from diffusion_opt.recipes.search.trial import Look
from diffusion_opt.subjects import Run, denoisers

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial

ABOUT, LOOK, POINT, REFUSED = "about", "look", "point", "refused"


def about(pipe: DiffusionPipeline, run: Run, objective: Objective, space: Space, budget: Budget) -> dict[str, str]:
    """What trials depend on, each part as a digest."""
    parts = {
        "model": identity(denoisers(pipe)).model,
        "run": run.fingerprint(),
        "objective": {name: value for name, value in asdict(objective).items() if name not in ("tolerance", "verdict")},
        "space": space.stated(),
        "samples": budget.samples,
        "seed": budget.seed,
    }
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for name, value in parts.items()
    }


@contextmanager
def opened(path: Path | None, stated: dict[str, str]) -> Iterator["Study"]:
    """The study of a file, or one in memory. Raises ValueError for the file of another search, naming what differs."""
    import optuna
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = InMemoryStorage() if path is None else JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage, study_name="recipes", directions=["minimize"] * 3, load_if_exists=True
        )
        known = study.user_attrs.get(ABOUT)
        if known is None:
            study.set_user_attr(ABOUT, stated)
        elif different := [name for name in stated if known.get(name) != stated[name]]:
            raise ValueError(
                f"{path} is the study of another search: its {different[0]} is {known.get(different[0])}, here it is "
                f"{stated[different[0]]}; name another folder, or repeat the settings it began with"
            )
        yield study
    finally:
        optuna.logging.set_verbosity(level)


def go_on(
    study: "Study", space: Space, look: Callable[[Point], Look], cost: Callable[[Look], float], budget: Budget,
    progress: bool = True,
) -> None:  # fmt: skip
    """Try points until the budget's number of trials has ended; those in the study count."""
    from optuna.trial import TrialState

    ended = [trial for trial in study.trials if trial.state.is_finished()]
    starts, seen = space.starts(), {_key(trial.user_attrs[POINT]): trial for trial in ended}
    with tqdm(total=budget.trials, initial=min(len(ended), budget.trials), desc="search", disable=not progress) as bar:
        for number in range(len(ended), budget.trials):
            study.sampler = _sampler(budget.seed + number, len(starts))
            if number < len(starts):
                study.enqueue_trial(starts[number], skip_if_exists=False)
            trial = study.ask()
            point = space.suggest(trial)
            trial.set_user_attr(POINT, point)
            before = seen.get(_key(point))
            if before is not None and before.values is not None:  # the same samples would come out
                trial.set_user_attr(LOOK, before.user_attrs[LOOK])
                study.tell(trial, before.values)
            else:
                _try(study, trial, point, look, cost, TrialState)
            seen[_key(point)] = study.trials[trial.number]
            bar.set_postfix_str(f"{len(study.best_trials)} on the front")
            bar.update()


def _sampler(seed: int, num_starts: int) -> "TPESampler":
    """A sampler for conditional spaces, whose two settings for them Optuna calls experimental."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=num_starts, multivariate=True, group=True)


def _try(study: "Study", trial: Any, point: Point, look: Callable, cost: Callable, states: Any) -> None:
    """One look; a point whose techniques refuse one another is told as pruned, with the reason."""
    try:
        found = look(point)
    except ValueError as error:
        trial.set_user_attr(REFUSED, str(error))
        study.tell(trial, state=states.PRUNED)
        return
    trial.set_user_attr(LOOK, found.to_dict())
    study.tell(trial, [cost(found), found.loss, float(found.weight_bytes)])


def front(study: "Study", survivors: int, tolerance: float) -> list["FrozenTrial"]:
    """The trials that are worth a full measurement, by cost: of the front, those spread over the losses that matter.

    Always among them: the cheapest within the tolerance. Trials far beyond it (ten times) are left out.
    """
    unique = {_key(trial.user_attrs[POINT]): trial for trial in study.best_trials}
    near = sorted((trial for trial in unique.values() if trial.values[1] <= 10 * tolerance), key=lambda t: t.values[0])
    within = [trial for trial in near if trial.values[1] <= tolerance]
    if len(near) <= survivors:
        return near
    chosen = {within[0].number} if within else set()
    for place in range(survivors):
        if len(chosen) < survivors:
            chosen.add(near[round(place * (len(near) - 1) / max(survivors - 1, 1))].number)
    return [trial for trial in near if trial.number in chosen]


def _key(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)
