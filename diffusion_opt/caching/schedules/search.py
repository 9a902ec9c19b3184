"""Search a schedule: which steps to compute, under a budget of steps or of error.

Two stages. **Dynamic programming** over (number computed, computed step before, computed step) finds, for every number
of computed steps at once, the best row of stretches by `segment_costs.py`: the least sum, or the least worst stretch
(minimax, as LeMiCa does; Gao et al. 2025, arXiv 2511.00090). It is exact for those costs and takes a second. But costs
judge each prediction on the full run's path, while a real run leaves it, and errors may cancel; the fewer steps, the
less they say. So **hill climbing** follows, from the best of both schedules and even spacing: move one computed step by
a few places, run the whole thing on a calibration batch, keep what lowers the error of the final latents (as BudCache
does; arXiv 2606.13496). A few dozen runs suffice, each as short as its budget.

The result is a mask known before any run: no threshold, no signal, no synchronization, the exact cost known in advance.
Only the first step is given; where to spend the others is what is searched for. The judge is the full run's own output:
no data, no reference images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusion_opt.caching.rules import FixedSchedule
from diffusion_opt.caching.schedules.recording import GenerationTask, record, relative_error
from diffusion_opt.caching.schedules.segment_costs import NONE, SegmentCosts, amplification, judged_as, segment_costs
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.technique import check_predictor

Mask = tuple[bool, ...]
Objective = Literal["sum", "minimax"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that dynamic programming found, and what the segment costs say of it."""

    steps: tuple[int, ...]  # the computed ones
    cost: float  # upper estimate of the final relative error; with minimax, of its worst stretch

    def mask(self, num_steps: int) -> Mask:
        return tuple(step in self.steps for step in range(num_steps))


def best_schedules(costs: SegmentCosts, objective: Objective = "sum") -> dict[int, Candidate]:
    """The best schedule for each possible number of computed steps, exactly, by dynamic programming.

    Raises ValueError for a run of one step.
    """
    end = costs.num_steps
    if end < 2:
        raise ValueError("a run of one step has none to skip, two are the least")
    looks_back = judged_as(costs.predictor).num_anchors > 1
    found: dict[int, Candidate] = {}
    reached = {(NONE, 0): Candidate((0,), 0.0)}  # by (computed step before, computed step)
    for number in range(1, end + 1):
        following: dict[tuple[int, int], Candidate] = {}
        for (h, a), so_far in reached.items():
            for j in range(a + 1, min(end, a + costs.max_gap) + 1):
                segment = costs.values[h, a, j]
                cost = so_far.cost + segment if objective == "sum" else max(so_far.cost, segment)
                if j == end:
                    if number not in found or cost < found[number].cost:
                        found[number] = Candidate(so_far.steps, cost)
                    continue
                state = (a if looks_back else NONE), j
                if state not in following or cost < following[state].cost:
                    following[state] = Candidate((*so_far.steps, j), cost)
        reached = following
    return found


def check_budget(budget: int, num_steps: int, max_gap: int) -> None:
    """Raise ValueError unless a run of `num_steps` can compute `budget` of them with gaps of `max_gap` at most."""
    least = -(-num_steps // max_gap)
    if not least <= budget <= num_steps:
        raise ValueError(
            f"with gaps of {max_gap} at most, a run of {num_steps} steps computes {least} … {num_steps} of them, "
            f"got a budget of {budget}: choose one of these or a larger max_gap"
        )


def within_budget(costs: SegmentCosts, budget: int, objective: Objective = "sum") -> Candidate:
    """The best schedule of exactly `budget` computed steps. Raises ValueError if there is none."""
    check_budget(budget, costs.num_steps, costs.max_gap)
    return best_schedules(costs, objective)[budget]


def fewest_steps(costs: SegmentCosts, max_error: float, objective: Objective = "sum") -> Candidate:
    """The schedule of the fewest computed steps whose cost is `max_error` at most (computing all costs nothing).

    The cost is an estimate; for an error that holds with a given confidence see `error_bound.py`. Raises ValueError
    for a negative error.
    """
    if max_error < 0:
        raise ValueError(f"max_error is a relative error, 0 or more, 0.02 for a start, got {max_error}")
    found = best_schedules(costs, objective)
    return next(found[number] for number in sorted(found) if found[number].cost <= max_error)


@dataclass(frozen=True, slots=True)
class Climb:
    """Where a hill climb went: the best mask, and the error of the best so far after each trial, the start first."""

    mask: Mask
    errors: tuple[float, ...]


def climb(
    mask: Mask,
    error: Callable[[Mask], float],
    generator: torch.Generator,
    trials: int = 40,
    reach: int = 2,
    progress: bool = False,
    begin: int = 0,
) -> Climb:
    """Move one computed step at a time by `reach` places at most, and keep what lowers `error`.

    The step `begin`, the first of the run, stays, and so do those before it. No mask is tried twice; it ends early if
    no move is left.
    """
    errors = [error(mask)]
    tried = {mask}
    with tqdm(total=trials, desc=f"climb at {sum(mask)} steps", unit="run", disable=not progress) as bar:
        for _ in range(trials):
            moves = [moved for moved in _moves(mask, reach, begin) if moved not in tried]
            if not moves:
                break
            candidate = moves[int(torch.randint(len(moves), (), generator=generator))]
            tried.add(candidate)
            found = error(candidate)
            if found < errors[-1]:
                mask = candidate
            errors.append(min(found, errors[-1]))
            bar.update()
            bar.set_postfix(error=f"{errors[-1]:.4f}", start=f"{errors[0]:.4f}")
    return Climb(mask, tuple(errors))


def _moves(mask: Mask, reach: int, begin: int) -> list[Mask]:
    """The masks one move away, in a fixed order."""
    moves = []
    for here in range(begin + 1, len(mask)):
        for there in range(max(begin + 1, here - reach), min(len(mask) - 1, here + reach) + 1):
            if mask[here] and not mask[there]:
                moved = list(mask)
                moved[here], moved[there] = False, True
                moves.append(tuple(moved))
    return moves


def schedule_error(
    pipe: DiffusionPipeline, mask: Mask, predictor: PredictorName, task: GenerationTask, reference: torch.Tensor
) -> torch.Tensor:
    """Relative error (B,) of the final latents of a task under a mask. The pipeline is left as it was."""
    technique = FixedSchedule(mask, predictor)
    technique.apply(pipe)
    try:
        return relative_error(task.run(pipe), reference)
    finally:
        technique.remove(pipe)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search."""

    predictor: PredictorName = "forecast"
    max_gap: int = 12  # most steps from one computed step to the next
    amplify_every: int = 5  # measure A_k at every such step, one full run each; 0: leave A_k at 1
    trials: int = 40  # runs of the hill climb for each budget; 0: dynamic programming alone
    seed: int = 0  # of the climb's moves

    def __post_init__(self) -> None:
        check_predictor(self.predictor)
        if self.max_gap < 2:
            raise ValueError(f"max_gap must be at least 2 (skip one step in two), got {self.max_gap}")
        if self.amplify_every < 0 or self.trials < 0:
            raise ValueError(f"amplify_every and trials must be 0 or more, got {self.amplify_every}, {self.trials}")


def measure_costs(
    pipe: DiffusionPipeline, tasks: Sequence[GenerationTask], settings: SearchSettings, progress: bool = False
) -> SegmentCosts:
    """Record the tasks, one at a time, and cost all stretches; A_k is measured on the first task."""
    weights = None
    if settings.amplify_every:
        weights = amplification(pipe, tasks[0], settings.predictor, settings.amplify_every, progress)
    recordings = (record(pipe, task) for task in tasks)
    return segment_costs(pipe, recordings, settings.predictor, weights, settings.max_gap, progress)


def starting_masks(costs: SegmentCosts, budget: int) -> tuple[Mask, ...]:
    """Where a climb may begin: dynamic programming by both objectives, and even spacing.

    Raises ValueError if the budget cannot be kept.
    """
    found = (within_budget(costs, budget, objective) for objective in get_args(Objective))
    masks = (*(candidate.mask(costs.num_steps) for candidate in found), even_mask(costs.num_steps, budget))
    return tuple(costs.whole(mask) for mask in masks)


def search_mask(
    pipe: DiffusionPipeline,
    task: GenerationTask,
    reference: torch.Tensor,
    starts: Sequence[Mask],
    settings: SearchSettings,
    progress: bool = False,
    begin: int = 0,
) -> Climb:
    """Run all starts on one task with its full run's `reference`, and climb from the best of them.

    `begin` is the step at which the run begins, above 0 for one that starts from a picture.
    """

    def error(mask: Mask) -> float:
        return float(schedule_error(pipe, mask, settings.predictor, task, reference).mean())

    generator = torch.Generator().manual_seed(settings.seed)
    start = min(starts, key=error) if len(starts) > 1 else starts[0]
    return climb(start, error, generator, settings.trials, progress=progress, begin=begin)


def even_mask(num_steps: int, budget: int) -> Mask:
    """`budget` computed steps at even distances, the first among them, as a solver with fewer steps would have them."""
    chosen = {number * num_steps // budget for number in range(budget)}
    return tuple(step in chosen for step in range(num_steps))
