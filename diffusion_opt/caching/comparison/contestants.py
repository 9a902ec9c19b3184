"""Who takes part in a comparison at equal cost, and how each spends its budget.

A contestant turns a budget of full steps (`contest.py`) into a setting that keeps it, and gets every help that costs
nothing at run time: thresholds are tuned on noises of their own until one more computed step would not fit, of discrete
settings all that fit are tried and the best is taken, and what is calibrated is calibrated on the model at hand.

    FewerSteps    plain sampling with as many steps as the budget: the baseline that costs nobody anything
    Tuned         one threshold, by bisection: the rules, and most of other libraries' caches
    Chosen        a list of settings, of which the best that fits is taken
    EvenSpacing   told how many steps to compute
    Searched      told so too, and searches which

All caches act on the Euler run. Those that might gain by the second-order one act on that too: the search, and of the
other libraries' TaylorSeer, the strongest.

MagCache computes the first fifth of the steps and skips three in a row at most, as published; no threshold then brings
50 steps below 20. Both limits are widened here, to a twenty-fifth and to twelve, in ours and in diffusers'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Literal, Protocol

from diffusion_opt.caching.comparison.baselines import (
    CacheDit,
    CannotRunError,
    DiffusersCache,
    faster_cache,
    first_block,
    mag_cache,
    pyramid_attention,
    taylor_seer,
)
from diffusion_opt.caching.comparison.contest import Contest, Scope, Setting, Solver, scheduled, scope_of
from diffusion_opt.caching.rules import EasyCache, FirstBlockCache, FixedSchedule, MagCache, StepTable, TeaCache
from diffusion_opt.caching.schedules.recording import relative_error
from diffusion_opt.caching.schedules.search import SearchSettings, even_mask, measure_costs, search_mask, starting_masks
from diffusion_opt.caching.schedules.segment_costs import SegmentCosts
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.technique import StepCacheTechnique

Group = Literal["fewer steps", "another library", "rule", "even spacing", "searched"]
MAX_SKIPS, RETENTION = 12, 0.04  # of MagCache; published 3 and 0.2
TRIALS = 14  # runs of a bisection at most
BEYOND_ALL = 1e6  # a threshold that nothing reaches


class Contestant(Protocol):
    """A policy that can be given any budget."""

    name: str
    group: Group

    def spend(self, contest: Contest, budget: int) -> Setting:
        """The setting for a budget of full steps. Raises CannotRunError, saying why, if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class FewerSteps:
    """The same or a better solver, with as many steps as the budget."""

    name: str
    solver: Solver
    group: Group = "fewer steps"

    def spend(self, contest: Contest, budget: int) -> Setting:
        return Setting(f"{budget} steps", budget, self.solver)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A threshold is raised until the budget is kept. `make` gives the scope for a threshold, and its description."""

    name: str
    make: Callable[[float], tuple[Scope, str]]
    group: Group = "rule"
    start: float = 0.1  # first threshold tried
    tried: dict[float, float] = field(default_factory=dict)  # full steps by threshold

    def spend(self, contest: Contest, budget: int) -> Setting:
        if (least := self._cost(contest, BEYOND_ALL)) > budget:
            raise CannotRunError(f"it takes {least:.1f} full steps or more, whatever the threshold")
        low, high = 0.0, self.start
        while self._cost(contest, high) > budget:
            low, high = high, 2 * high
        for _ in range(TRIALS):
            if self._cost(contest, high) > budget - (1 - contest.skipped_step) or high - low < 1e-4 * high:
                break
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(contest, middle) > budget else (low, middle)
        return self._setting(contest, high)

    def _setting(self, contest: Contest, threshold: float) -> Setting:
        scope, label = self.make(threshold)
        return Setting(label, contest.steps, "euler", scope)

    def _cost(self, contest: Contest, threshold: float) -> float:
        if threshold not in self.tried:
            self.tried[threshold] = contest.tuning_cost(self._setting(contest, threshold))
        return self.tried[threshold]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Of the settings that keep the budget, the one with the least error on the tuning batch."""

    name: str
    settings: Callable[[int], Sequence[Setting]]  # candidates for a budget
    group: Group = "another library"
    tried: dict[str, tuple[float, float]] = field(default_factory=dict)  # full steps and error by label

    def spend(self, contest: Contest, budget: int) -> Setting:
        candidates = self.settings(budget)
        if not candidates:
            raise CannotRunError(f"none of its settings computes {budget} steps or fewer")
        for setting in candidates:
            if setting.label not in self.tried:
                self.tried[setting.label] = _tried(contest, setting)
        fitting = [setting for setting in candidates if self.tried[setting.label][0] <= budget]
        if not fitting:
            least = min(self.tried[setting.label][0] for setting in candidates)
            raise CannotRunError(f"it takes {least:.1f} full steps or more")
        return min(fitting, key=lambda setting: self.tried[setting.label][1])


def _tried(contest: Contest, setting: Setting) -> tuple[float, float]:
    task = contest.tuning_task(setting.steps)
    outputs, cost = contest.spent(setting, [task])
    return cost, float(relative_error(outputs, contest.tuning_reference(setting.solver)).mean())


@dataclass(frozen=True, slots=True)
class EvenSpacing:
    """As many computed steps as the budget affords, at even distances."""

    name: str
    predictor: PredictorName
    group: Group = "even spacing"

    def spend(self, contest: Contest, budget: int) -> Setting:
        mask = even_mask(contest.steps, contest.affordable(budget))
        return scheduled(FixedSchedule(mask, self.predictor), "euler")


@dataclass(frozen=True, slots=True)
class Searched:
    """The schedule that dynamic programming and a climb find for what the budget affords, on a solver's full run.

    The climb may also begin where a calibrated rule would compute, so that it cannot be beaten by that for want of it.
    """

    name: str
    solver: Solver
    settings: SearchSettings
    group: Group = "searched"
    costs: list[SegmentCosts] = field(default_factory=list)  # one that serves all budgets, made when first needed

    def spend(self, contest: Contest, budget: int) -> Setting:
        task = contest.tuning_task(contest.steps)
        number = contest.affordable(budget)
        with contest.solver(self.solver):
            if not self.costs:
                self.costs.append(measure_costs(contest.pipe, [task], self.settings, contest.progress))
            reference = contest.tuning_reference(self.solver)
            starts = (*starting_masks(self.costs[0], number), equal_change_mask(contest.calibration.step_table, number))
            found = search_mask(contest.pipe, task, reference, starts, self.settings, contest.progress)
        return scheduled(FixedSchedule(found.mask, self.settings.predictor), self.solver)


def equal_change_mask(table: Sequence[float], number: int) -> tuple[bool, ...]:
    """`number` computed steps between which the residual changes by as much each time, by a calibrated step table."""
    passed = [0.0, *accumulate(table)]
    chosen: set[int] = set()
    for index in range(number):
        target = passed[-1] * index / number
        free = [step for step in range(len(passed)) if step not in chosen]
        chosen.add(next((step for step in free if passed[step] >= target), free[-1]))
    return tuple(step in chosen for step in range(len(passed)))


def contestants(contest: Contest, search: SearchSettings) -> dict[str, Contestant]:
    """Everybody by name, baselines first, ours last. Each remembers what it tried, for the next budget."""
    everyone = [
        FewerSteps("fewer Euler steps", "euler"),
        FewerSteps("fewer second-order steps", "adams_bashforth2"),
        *_libraries(contest),
        *_rules(contest),
        EvenSpacing("even spacing, reuse", "reuse"),
        EvenSpacing("even spacing, forecast", "forecast"),
        Searched("searched, reuse", "euler", replace(search, predictor="reuse")),
        Searched("searched, forecast", "euler", search),
        Searched("searched on the second-order run, forecast", "adams_bashforth2", search),
    ]
    return {contestant.name: contestant for contestant in everyone}


def _rules(contest: Contest) -> list[Contestant]:
    makers: dict[str, Callable[[float, PredictorName], StepCacheTechnique]] = {
        "TeaCache": lambda threshold, how: TeaCache(threshold, how, contest.calibration_path),
        "TeaCache, polynomial": lambda threshold, how: TeaCache(threshold, how, contest.calibration_path, "polynomial"),
        "step table": lambda threshold, how: StepTable(threshold, contest.calibration_path, how),
        "MagCache": lambda threshold, how: MagCache(threshold, contest.calibration_path, how, MAX_SKIPS, RETENTION),
        "EasyCache": EasyCache,
        "first block": FirstBlockCache,
    }

    def rule(name: str, predictor: PredictorName, threshold: float) -> tuple[Scope, str]:
        technique = makers[name](threshold, predictor)
        return scope_of(technique), technique.describe()

    pairs = [(name, how) for name in makers for how in ("reuse", "forecast")]
    return [Tuned(f"{name}, {how}", partial(rule, name, how)) for name, how in pairs]


def _libraries(contest: Contest) -> list[Contestant]:
    steps, two_passes = contest.steps, contest.two_passes

    def by_threshold(name: str, make: Callable[[float], DiffusersCache | CacheDit]) -> Tuned:
        def scope(threshold: float) -> tuple[Scope, str]:
            cache = make(threshold)
            return cache.on, cache.describe()

        return Tuned(name, scope, "another library")

    def attention(make: Callable[[int], DiffusersCache], budget: int) -> list[Setting]:
        return [Setting(cache.describe(), steps, scope=cache.on) for cache in map(make, (2, 3, 4, 8, 16))]

    return [
        by_threshold("diffusers FirstBlockCache", first_block),
        by_threshold(
            "diffusers MagCache",
            lambda threshold: mag_cache(threshold, contest.calibration.magnitude_ratios, MAX_SKIPS, RETENTION),
        ),
        Chosen("diffusers TaylorSeer", partial(_taylor_settings, steps, "euler")),
        Chosen("diffusers TaylorSeer on the second-order run", partial(_taylor_settings, steps, "adams_bashforth2")),
        Chosen("diffusers PyramidAttentionBroadcast", partial(attention, pyramid_attention)),
        Chosen("diffusers FasterCache", partial(attention, faster_cache)),
        by_threshold("cache-dit", partial(CacheDit, steps, two_passes)),
        by_threshold("cache-dit, TaylorSeer", partial(CacheDit, steps, two_passes, order=1)),
    ]


def _taylor_settings(steps: int, solver: Solver, budget: int) -> list[Setting]:
    """Light TaylorSeer of orders 1 and 2: for each start, the two shortest intervals that can keep the budget."""
    found = []
    for first in (2, 3, 5):
        counts = {every: _taylor_steps(steps, every, first) for every in range(2, steps)}
        fitting = [every for every, number in counts.items() if number <= budget][:2]
        found += [taylor_seer(every, first, order) for every in fitting for order in (1, 2)]
    return [Setting(cache.describe(), steps, solver, cache.on) for cache in found]


def _taylor_steps(steps: int, every: int, first: int) -> int:
    """How many steps diffusers' TaylorSeer computes."""
    return sum(step < first or (step - first - 1) % every == 0 for step in range(steps))
