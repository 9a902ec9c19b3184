"""A searched schedule, saved with what it was searched for, and the cache that follows it.

A mask of computed steps is worth something for one model, time grid and guidance scale only, so it travels with them
(`CalibratedRun`) and with the errors that were measured, and refuses to serve others. Everything about its cost is
known before a run: it computes `num_computed` of the steps for every prompt, in every guidance branch.

    ScheduledCache("fashion-10").apply(pipe)          a shipped one, or the path of one that `search_schedule` made

`schedule_search.py` says how masks are found; `CacheSchedule.fixed` gives the bare mask, and `interop.cache_dit_mask`
of that what cache-dit wants.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusion_opt.caching.calibration.calibrated_run import Belonging, CalibratedRun, check_near, watched
from diffusion_opt.caching.calibration.stored import find_stored, read_stored
from diffusion_opt.caching.rules import FixedSchedule, MaskRule
from diffusion_opt.caching.rules.fixed import marks
from diffusion_opt.caching.schedules.recording import GenerationTask, generation_tasks
from diffusion_opt.caching.schedules.search import (
    Mask,
    SearchSettings,
    measure_costs,
    schedule_error,
    search_mask,
    starting_masks,
)
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import StepCacheTechnique
from diffusion_opt.datasets.writing import write_json
from diffusion_opt.subjects import Run

HELD_OUT = 10_000  # samples from here on are none that a search sees


@dataclass(frozen=True, slots=True)
class CacheSchedule:
    """A mask, what it was searched for, and its errors: relative L2 distance of final latents to the full run's."""

    run: CalibratedRun
    predictor: PredictorName
    mask: Mask  # True: compute
    start_error: float  # mean on the calibration batch, of the schedule that the climb began with
    error: float  # mean on the calibration batch, of this one: flattered, for it was chosen by that
    held_out_error: float | None  # mean on samples that the search never saw; None: not measured
    num_held_out: int

    def __post_init__(self) -> None:
        FixedSchedule(self.mask, self.predictor)  # raises if the cache could not honor it
        if len(self.mask) != self.run.num_inference_steps:
            raise ValueError(f"a mask of {len(self.mask)} steps cannot serve {self.run.describe()}: search anew")

    @property
    def num_computed(self) -> int:
        """Steps of the run in which the blocks run."""
        return sum(self.mask[self.run.begin :])

    def fixed(self) -> FixedSchedule:
        """The mask as a technique that knows nothing of models, for `interop.cache_dit_mask` or another pipeline."""
        return FixedSchedule(self.mask, self.predictor)

    def describe(self) -> str:
        """One line: the mask, the run, and the error."""
        held_out = ""
        if self.held_out_error is not None:
            held_out = f", on {self.num_held_out} held-out samples {self.held_out_error:.4f}"
        return (
            f"{marks(self.mask[self.run.begin :])} {self.num_computed} of {self.run.describe()}, {self.predictor}: "
            f"relative error {self.error:.4f} in calibration{held_out}"
        )

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self), indent=None)

    @classmethod
    def load(cls, name: str | Path) -> "CacheSchedule":
        """Read a schedule by shipped name or path.

        Raises FileNotFoundError if there is none and ValueError if the file is not a schedule.
        """
        path = find_stored(name, "schedule", "make one with `diffusion-opt cache search`")
        return cls(**read_stored(cls, path, "schedule", run=CalibratedRun))


def search_schedule(
    pipe: DiffusionPipeline,
    task: GenerationTask,
    starts: Sequence[Mask],
    settings: SearchSettings,
    held_out: Sequence[GenerationTask] = (),
    progress: bool = False,
) -> CacheSchedule:
    """Climb on `task` from the best of `starts`: `starting_masks`, or a schedule that was found before.

    Raises ValueError if the starts compute different numbers of steps.
    """
    if len({sum(mask) for mask in starts}) != 1:
        raise ValueError(f"starts must compute the same number of steps, got {[sum(mask) for mask in starts]}")
    with watched(pipe) as watch:
        reference = task.run(pipe)
        run = watch.run()
    found = search_mask(pipe, task, reference, starts, settings, progress, run.begin)
    errors = [schedule_error(pipe, found.mask, settings.predictor, new, new.run(pipe)) for new in held_out]
    return CacheSchedule(
        run=run,
        predictor=settings.predictor,
        mask=found.mask,
        start_error=found.errors[0],
        error=found.errors[-1],
        held_out_error=float(torch.cat(errors).mean()) if errors else None,
        num_held_out=sum(len(error) for error in errors),
    )


def search_schedules(
    pipe: DiffusionPipeline,
    run: Run,
    budgets: Sequence[int],
    settings: SearchSettings | None = None,
    num_held_out: int = 20,
    progress: bool = False,
) -> dict[int, CacheSchedule]:
    """A schedule for each budget of computed steps of a run: dynamic programming, then a climb on whole generations.

    The samples searched with are the first of each prompt; `num_held_out` later ones (0: none) give the error that is
    reported. Raises ValueError for a run that the pipeline cannot make, or a budget that it cannot keep.
    """
    run.check(pipe)
    settings = settings or SearchSettings()
    task = GenerationTask(run, tuple(range(len(run.prompts))))
    held_out = generation_tasks(run, num_held_out, first=HELD_OUT) if num_held_out else ()
    costs = measure_costs(pipe, generation_tasks(run), settings, progress)
    starts = {budget: starting_masks(costs, budget) for budget in budgets}  # raises before the long part
    return {
        budget: search_schedule(pipe, task, masks, settings, held_out, progress) for budget, masks in starts.items()
    }


class ScheduleRule(MaskRule):
    """A mask that is followed in the run it was searched for, and in no other."""

    def __init__(self, mask: tuple[bool, ...], belonging: Belonging) -> None:
        super().__init__(mask)
        self.belonging = belonging

    def check(self, stack: StackPass) -> None:
        """Raise ValueError if another kind of run begins here."""
        self.belonging.check(stack)


@dataclass(frozen=True, slots=True)
class ScheduledCache(StepCacheTechnique):
    """Technique: follow a searched schedule, with the predictor it was searched for."""

    schedule: str  # shipped name ("fashion-10") or path of a saved `CacheSchedule`
    near: float = 0.0  # how far a run may be from the one it was searched for (`calibrated_run.py`)

    def __post_init__(self) -> None:
        check_near(self.near)

    @property
    def predictor(self) -> PredictorName:
        return CacheSchedule.load(self.schedule).predictor

    def rule(self, pipe: DiffusionPipeline) -> ScheduleRule:
        """Raises FileNotFoundError for an unknown schedule, ValueError if it was searched on another model."""
        schedule = CacheSchedule.load(self.schedule)
        return ScheduleRule(schedule.mask, Belonging(schedule.run, pipe, self.near))

    def describe(self) -> str:
        return f"searched schedule {Path(self.schedule).stem}"
