"""What a calibration was made for: the model and the run, so that it can refuse to serve others.

Curves, ratios and tables hold for one set of weights under one scheduler, time grid, guidance scale and size. Published
ones travel without that knowledge, and a wrong one fails silently: it skips too much or never. So everything that is
calibrated here is saved with a `CalibratedRun`. The model is compared when a technique is applied, and again when a
generation begins with another network (`network.py`: an adapter came or went, weights were loaded). The run is compared
when a generation begins, with the schedule that its own pipeline then holds.

Another run is refused. Who knows what they do can allow one that is close, by `near`: up to that difference, times (in
[0, 1]) and the guidance scale (relative) may be others, and so may the size and the step at which the run begins, if it
is not earlier. FLUX.2 shifts its times by the size of the picture, so there another size is another time grid too.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.caching.step.hooks import arguments_of
from diffusion_opt.caching.step.network import NetworkState
from diffusion_opt.caching.step.running import Running, Whereabouts
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import check_one_transformer
from diffusion_opt.models.block_stack import block_stack
from diffusion_opt.models.fingerprint import identity

TIMESTEP_TOLERANCE = 5e-5  # of times in [0, 1]: far below a step of any grid, above rounding


def check_near(near: float) -> None:
    """Raise ValueError unless a tolerance lies in [0, 1)."""
    if not 0 <= near < 1:
        raise ValueError(f"near is a difference of times in [0, 1), 0 (the calibrated run alone) or 0.02, got {near}")


@dataclass(frozen=True, slots=True)
class CalibratedRun:
    """The model, scheduler, time grid, guidance scale and size of a calibration."""

    model: str  # `identity(transformer).model`
    scheduler: str  # class name
    timesteps: tuple[float, ...]  # the scheduler's, one a step, in its own unit (1,000 is noise)
    guidance_scale: float
    begin: int = 0  # the step at which the run begins; above 0 where it starts from a picture
    size: tuple[int, ...] = ()  # of one sample that the transformer is given; empty: not known, any is served

    def __post_init__(self) -> None:
        if not 0 <= self.begin < max(len(self.timesteps), 1):
            raise ValueError(f"a run of {len(self.timesteps)} steps cannot begin at step {self.begin}")

    @classmethod
    def of(cls, pipe: DiffusionPipeline, begin: int | None = None, size: tuple[int, ...] = ()) -> "CalibratedRun":
        """The run under way, or the last one. Guidance counts as 1, none, on a pipeline that was never called."""
        scheduler = pipe.scheduler
        timesteps = tuple(round(float(timestep), 2) for timestep in scheduler.timesteps)
        if begin is None:
            begin = getattr(scheduler, "begin_index", None) or 0
        model = identity(pipe.transformer).model
        return cls(model, type(scheduler).__name__, timesteps, _guidance(pipe), begin, size)

    @property
    def num_inference_steps(self) -> int:
        """Steps of the schedule, those before the run begins included."""
        return len(self.timesteps)

    @property
    def num_passes(self) -> int:
        """Steps that the run takes."""
        return len(self.timesteps) - self.begin

    def check_model(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError unless this is the model that was calibrated, its active adapters included."""
        found = identity(pipe.transformer)
        if found.model != self.model:
            raise ValueError(
                f"this was calibrated on model {self.model}, this one is {found.model} ({found.describe()}): "
                "calibrate anew"
            )

    def check_run(self, running: Running, size: tuple[int, ...], near: float = 0.0) -> None:
        """Raise ValueError unless the run that begins here is the calibrated one, or as near to it as `near` allows."""
        pipe = running.pipe
        found = (type(pipe.scheduler).__name__, len(running.times))
        if found != (self.scheduler, self.num_inference_steps):
            raise ValueError(
                f"this was calibrated for {self.scheduler} with {self.num_inference_steps} steps, this run is "
                "{} with {} steps: calibrate anew".format(*found)
            )
        guidance = _guidance(pipe)
        if abs(guidance - self.guidance_scale) > near * abs(self.guidance_scale):
            raise ValueError(
                f"this was calibrated for guidance {self.guidance_scale:g}, this run has guidance {guidance:g}: "
                + _remedy(abs(guidance / self.guidance_scale - 1) if self.guidance_scale else None)
            )
        self._check_times(running, near)
        if self.size and not near and size != self.size:
            raise ValueError(f"this was calibrated on samples of {self.size}, this run has {size}: {_remedy(0.001)}")

    def _check_times(self, running: Running, near: float) -> None:
        theirs = [timestep / 1000 for timestep in self.timesteps]
        for step, (ours, its) in enumerate(zip(running.times, theirs, strict=True)):
            if abs(ours - its) > max(near, TIMESTEP_TOLERANCE):
                raise ValueError(
                    f"this was calibrated on another time grid: step {step} was at t = {its:.6g}, in this run it is at "
                    f"{ours:.6g} (another shift, or another size where the shift depends on it): {_remedy(ours - its)}"
                )
        late = running.place >= self.begin and abs(theirs[running.place] - theirs[self.begin]) <= near
        if running.place != self.begin and not late:
            wanted = theirs[self.begin] - theirs[running.place] if running.place > self.begin else None
            raise ValueError(
                f"this was calibrated for runs that begin at step {self.begin}, this one begins at step "
                f"{running.place} of {len(theirs)} (another strength): {_remedy(wanted)}"
            )

    def describe(self) -> str:
        """Steps, scheduler and guidance, in words."""
        late = f" from step {self.begin}" if self.begin else ""
        return f"{self.num_inference_steps} steps of {self.scheduler}{late}, guidance {self.guidance_scale:g}"


def _guidance(pipe: DiffusionPipeline) -> float:
    return float(getattr(pipe, "guidance_scale", None) or 1.0)


def _remedy(difference: float | None) -> str:
    """What to do about a run that differs by so much."""
    if difference is None or not 0 < abs(difference) < 0.5:
        return "calibrate anew for this run"
    return f"calibrate anew for this run, or allow it knowingly with near={_upwards(abs(difference)):g}"


def _upwards(difference: float) -> float:
    """A round number above a difference."""
    return next(near for near in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if near > difference)


class Belonging:
    """What a calibrated rule asks at each generation: is this still the calibrated model, and the calibrated run?

    Raises ValueError for another model, when it is made and when the network has changed since.
    """

    def __init__(self, run: CalibratedRun, pipe: DiffusionPipeline, near: float = 0.0) -> None:
        check_near(near)
        check_one_transformer(pipe, "calibrations and searched schedules")
        run.check_model(pipe)
        self.run, self.near = run, near
        self._network = NetworkState(pipe.transformer)

    def check(self, stack: StackPass) -> None:
        """Raise ValueError if the generation that begins with this pass is not one that was calibrated."""
        if stack.running is None:
            warnings.warn("a loop without a schedule cannot be compared with the calibrated run", stacklevel=2)
            return
        self.run.check_run(stack.running, tuple(stack.sample.shape[1:]), self.near)
        found = NetworkState(stack.running.pipe.transformer)
        if found != self._network:
            self.run.check_model(stack.running.pipe)
            self._network = found

    def place(self, stack: StackPass, counted: int) -> int:
        """The number of a pass in the calibrated run; where no schedule is known, as it was counted."""
        return counted if stack.step is None else stack.step[0] - self.run.begin


class Watch:
    """Sees where the runs of a pipeline begin and what size they have."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe, self._whereabouts, self._family = pipe, Whereabouts(pipe), block_stack(pipe.transformer)
        self._seen: tuple[int, tuple[int, ...]] | None = None

    def first_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward hook: what the first pass of all is."""
        if self._seen is not None:
            return
        call = arguments_of(module, args, kwargs)
        running = self._whereabouts.of(module, lambda: self._family.time_of(call))
        self._seen = 0 if running is None else running.place, tuple(self._family.sample(call).shape[1:])

    def run(self) -> CalibratedRun:
        """The last run. Raises ValueError if there was none."""
        if self._seen is None:
            raise ValueError("the transformer was never called, so there is no run to describe")
        return CalibratedRun.of(self._pipe, *self._seen)


@contextmanager
def watched(pipe: DiffusionPipeline) -> Iterator[Watch]:
    """During this block the runs of a pipeline are watched."""
    watch = Watch(pipe)
    handle = pipe.transformer.register_forward_pre_hook(watch.first_pass, with_kwargs=True)
    try:
        yield watch
    finally:
        handle.remove()
