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

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun
from diffusion_opt.caching.calibration.stored import find_stored, read_stored
from diffusion_opt.caching.rules import FixedSchedule, MaskRule
from diffusion_opt.caching.rules.fixed import marks
from diffusion_opt.caching.schedules.recording import GenerationTask
from diffusion_opt.caching.schedules.search import Mask, SearchSettings, schedule_error, search_mask
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.technique import StepCacheTechnique
from diffusion_opt.datasets.writing import write_json


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
        """Steps in which the blocks run."""
        return sum(self.mask)

    def fixed(self) -> FixedSchedule:
        """The mask as a technique that knows nothing of models, for `interop.cache_dit_mask` or another pipeline."""
        return FixedSchedule(self.mask, self.predictor)

    def describe(self) -> str:
        """One line: the mask, the run, and the error."""
        held_out = ""
        if self.held_out_error is not None:
            held_out = f", on {self.num_held_out} held-out samples {self.held_out_error:.4f}"
        return (
            f"{marks(self.mask)} {self.num_computed} of {self.run.describe()}, {self.predictor}: relative error "
            f"{self.error:.4f} in calibration{held_out}"
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
    reference = task.run(pipe)
    run = CalibratedRun.of(pipe)
    found = search_mask(pipe, task, reference, starts, settings, progress)
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


class ScheduleRule(MaskRule):
    """A mask that is followed in the run it was searched for, and in no other."""

    def __init__(self, mask: tuple[bool, ...], run: CalibratedRun) -> None:
        super().__init__(mask)
        self.run = run

    def start(self, pipe: DiffusionPipeline | None) -> None:
        """A new generation begins. Raises ValueError if it is another kind of run."""
        super().start(pipe)
        if pipe is not None:
            self.run.check_run(pipe)


@dataclass(frozen=True, slots=True)
class ScheduledCache(StepCacheTechnique):
    """Technique: follow a searched schedule, with the predictor it was searched for."""

    schedule: str  # shipped name ("fashion-10") or path of a saved `CacheSchedule`

    @property
    def predictor(self) -> PredictorName:
        return CacheSchedule.load(self.schedule).predictor

    def rule(self, pipe: DiffusionPipeline) -> ScheduleRule:
        """Raises FileNotFoundError for an unknown schedule, ValueError if it was searched on another model."""
        schedule = CacheSchedule.load(self.schedule)
        schedule.run.check_model(pipe)
        return ScheduleRule(schedule.mask, schedule.run)

    def describe(self) -> str:
        return f"searched schedule {Path(self.schedule).stem}"
