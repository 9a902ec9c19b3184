"""What it costs to skip: for every stretch of steps, the error that its predictions would make.

A schedule is a row of computed steps, and between two of them, a and j, everything is predicted from a and the computed
step h before it (from a alone if it is the first). The stretch costs

    c(h, a, j) = sum over a < k < j of  A_k |dt_k| |v'_k - v_k| / |x_0|

with v_k the velocity of the full run, v'_k the one that the predicted residual gives at the same x_k (`Replay`: no
block runs), dt_k the step in time, and A_k how far an error made at step k has grown when it arrives at the image. A_k
is measured: skip step k alone in a real run, and divide the error of the final latents by |dt_k| |v'_k - v_k|. Early
errors can grow a lot, late ones have no time to. BudCache and LeMiCa (arXiv 2606.13496, 2511.00090) leave A_k out.

The costs of a schedule's stretches, added, are an upper estimate of its final relative error: norms add where errors
may cancel, and each step is judged on the full run's x_k. `schedule_search.py` finds the schedules.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.caching.rules import FixedSchedule
from diffusion_opt.caching.schedules.recording import GenerationTask, Recording, Replay, record, relative_error
from diffusion_opt.caching.step.predictors import PREDICTORS, Anchor, Extrapolation, PredictorName

NONE = -1  # in the place of an earlier anchor that is not looked at
Segment = tuple[int, int, int]  # anchor before, anchor, next computed step


@dataclass(frozen=True, slots=True)
class SegmentCosts:
    """c(h, a, j) for every stretch with gaps of `max_gap` at most; h is NONE where there is one anchor to look at.

    A stretch that goes on to the end of the run has j = num_steps.
    """

    num_steps: int  # that the run takes; they are counted from the one at which it begins
    predictor: PredictorName
    max_gap: int  # most steps from one computed step to the next
    values: dict[Segment, float]
    begin: int = 0  # place in the schedule at which the run begins

    def whole(self, mask: tuple[bool, ...]) -> tuple[bool, ...]:
        """A mask of the run's steps as one of the whole schedule; what comes before the run is marked computed."""
        return (True,) * self.begin + mask


def judged_as(predictor: PredictorName) -> Extrapolation:
    """The predictor that stands in for another in the costs: of those that look at three anchors, the straight line.

    With a third anchor the table would be ten times as large. The climb (`schedule_search.py`) runs the real one.
    """
    own = PREDICTORS[predictor]
    return own if own.num_anchors <= 2 else PREDICTORS["forecast"]


def _anchors(recording: Recording, steps: tuple[int, ...]) -> dict[str, list[Anchor]]:
    return {
        name: [Anchor(passes[step].time, passes[step].residual) for step in steps]
        for name, passes in recording.passes.items()
    }


def velocity_error(
    replay: Replay, step: int, anchors: tuple[int, ...], predictor: Extrapolation
) -> Float[Tensor, " b"]:
    """|v' - v| of each sample at a step whose residual is predicted from those of the steps `anchors`."""
    recording = replay.recording
    time = recording.times[step]
    used = predictor.with_anchors(len(anchors))
    residuals = {name: used.predict(kept, time) for name, kept in _anchors(recording, anchors).items()}
    difference = replay.velocity(step, residuals) - recording.velocity(step)
    return difference.float().flatten(1).norm(dim=1)


def segment_costs(
    pipe: DiffusionPipeline,
    recordings: Iterable[Recording],
    predictor: PredictorName,
    amplification: Float[Tensor, " t"] | None = None,
    max_gap: int = 12,
    progress: bool = False,
) -> SegmentCosts:
    """The costs, mean over the samples of all recordings, which are looked at one after the other.

    `amplification` is A_k of each step; None: 1. Raises ValueError without recordings or if they differ in steps.
    """
    judge = judged_as(predictor)
    totals: dict[Segment, float] = {}
    num_samples, num_steps, begin = 0, None, 0
    for recording in recordings:
        if num_steps not in (None, recording.num_steps):
            raise ValueError(f"recordings must have the same steps, got {num_steps} and {recording.num_steps}")
        num_steps, begin = recording.num_steps, recording.run.begin
        num_samples += len(recording.output)
        weights = torch.ones(num_steps) if amplification is None else amplification
        _add(totals, pipe, recording, judge, weights, max_gap, progress)
    if num_steps is None:
        raise ValueError("segment costs need a recording or more, got none")
    means = {key: value / num_samples for key, value in totals.items()}
    return SegmentCosts(num_steps, predictor, max_gap, means, begin)


def _add(
    totals: dict[Segment, float],
    pipe: DiffusionPipeline,
    recording: Recording,
    judge: Extrapolation,
    weights: Float[Tensor, " t"],
    max_gap: int,
    progress: bool,
) -> None:
    """Add the costs of one recording, summed over its samples, to the totals."""
    steps = recording.num_steps
    size = recording.output.float().flatten(1).norm(dim=1)
    times = recording.times
    pairs = [(h, a) for a in range(steps) for h in _before(a, judge.num_anchors, max_gap)]
    with Replay(pipe.transformer, recording) as replay:
        for h, a in tqdm(pairs, desc="segment costs", unit="anchors", disable=not progress):
            cost = 0.0
            totals.setdefault((h, a, a + 1), 0.0)
            anchors = (a,) if h == NONE else (h, a)
            for k in range(a + 1, min(steps, a + max_gap)):
                error = (velocity_error(replay, k, anchors, judge) / size).sum()
                cost += float(weights[k] * (times[k] - times[k + 1]) * error)
                totals[h, a, k + 1] = totals.get((h, a, k + 1), 0.0) + cost


def _before(anchor: int, num_anchors: int, max_gap: int) -> range | tuple[int]:
    return (NONE,) if num_anchors == 1 or anchor == 0 else range(max(0, anchor - max_gap), anchor)


def amplification(
    pipe: DiffusionPipeline,
    task: GenerationTask,
    predictor: PredictorName,
    every: int = 1,
    progress: bool = False,
) -> Float[Tensor, " t"]:
    """A_k of each step, mean over the samples of a task: one real run with a single skip for every `every`-th step.

    Steps between are interpolated; the first step, which is always computed, gets the value of the second. Raises
    ValueError for a run of one step.
    """
    recording, judge = record(pipe, task), judged_as(predictor)
    last, before = recording.num_steps - 1, (True,) * recording.run.begin
    if last < 1:
        raise ValueError("a run of one step has none to skip, two are the least")
    probed = sorted({*range(1, last, every), last})
    measured = []
    for k in tqdm(probed, desc="amplification", unit="run", disable=not progress):
        technique = FixedSchedule(before + tuple(step != k for step in range(last + 1)), predictor)
        technique.apply(pipe)
        try:
            final = relative_error(task.run(pipe), recording.output)
        finally:
            technique.remove(pipe)
        with Replay(pipe.transformer, recording) as replay:
            error = velocity_error(replay, k, tuple(range(max(0, k - judge.num_anchors), k)), judge)
        made = error / recording.output.float().flatten(1).norm(dim=1) * (recording.times[k] - recording.times[k + 1])
        measured.append(float(final.mean() / made.mean()))
    return _interpolated(probed, measured, last + 1)


def _interpolated(places: list[int], values: list[float], length: int) -> Float[Tensor, " t"]:
    """Linear between the places, constant beyond them."""
    found = torch.empty(length)
    for step in range(length):
        right = next((i for i, place in enumerate(places) if place >= step), len(places) - 1)
        left = max(right - 1, 0) if places[right] > step else right
        span = places[right] - places[left]
        share = min(max((step - places[left]) / span, 0.0), 1.0) if span else 0.0
        found[step] = values[left] + share * (values[right] - values[left])
    return found
