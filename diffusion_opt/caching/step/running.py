"""Which generation a pass belongs to: the pipeline that is calling, and the place in its scheduler's schedule.

A transformer does not know who calls it. One may stand in several pipelines (`from_pipe` makes a second one around the
same parts), the pipeline that a cache was put on may be gone, and image-to-image begins in the middle of a schedule. So
nothing is remembered from the moment a cache was applied; each pass is asked anew:

    pipeline    the innermost `__call__` on the stack of this thread whose `self` has this transformer as a part
    schedule    its scheduler's timesteps; every generation sets new ones, so the tensor itself names the generation
    place       the scheduler's step index; before its first step the index it was told to begin at, else the time

Looking at the stack is what remains: a class would have to be patched to be told by a pipeline, and diffusers' context
of a pass has no field for it. Only frames called `__call__` are opened.

Loops without a pipeline are asked for the pipeline that the cache was applied to, and believed only where its scheduler
stands at the time of the pass. A time is taken from the schedule and not from the pass, because half precision rounds
what passes are given: two steps of a bfloat16 pipeline can have the same time.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.subjects.networks import NAMES

ROUNDED = 0.01  # times differ by less where one of them was rounded to 16 bits
SAME = 1e-3  # and by less where none was


@dataclass(frozen=True, slots=True)
class Running:
    """A generation under way, seen from one of its passes."""

    of_pipe: "weakref.ref[DiffusionPipeline]"
    schedule: Tensor  # the scheduler's timesteps
    times: tuple[float, ...]  # of all its steps, in [0, 1]
    place: int  # of the pass among them

    @property
    def pipe(self) -> DiffusionPipeline | None:
        """None once it is gone, long after the generation."""
        return self.of_pipe()

    @property
    def time(self) -> float:
        """Of the pass, in [0, 1]."""
        return self.times[self.place]

    @property
    def step(self) -> tuple[int, int]:
        """Place of the pass, and the number of steps."""
        return self.place, len(self.times)


def calling_pipeline(transformer: nn.Module) -> DiffusionPipeline | None:
    """The pipeline whose call is running the transformer in this thread; None outside of any."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline) and any(getattr(owner, n, None) is transformer for n in NAMES):
                return owner
        frame = frame.f_back
    return None


class _Known(threading.local):
    """The schedule that was last read in this thread: reading one waits for the device."""

    def __init__(self) -> None:
        self.schedule: Any = None
        self.times: tuple[float, ...] = ()


class Whereabouts:
    """Finds the generation of a pass; `pipe`, which is referred to weakly, is asked where no pipeline is calling."""

    def __init__(self, pipe: DiffusionPipeline | None) -> None:
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._known = _Known()

    def of(self, transformer: nn.Module, time: Callable[[], float | None]) -> Running | None:
        """The generation of a pass at a time in [0, 1], which is called for only where it is needed; None: unknown."""
        pipe = calling_pipeline(transformer)
        called = pipe is not None
        pipe = pipe if called else self._pipe()
        schedule = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        if not isinstance(schedule, Tensor) or not schedule.numel():
            return None
        times, place = self._times(pipe, schedule), _told(pipe.scheduler)
        if called and place is not None and place < len(times):
            return Running(weakref.ref(pipe), schedule, times, place)
        if place is not None and place >= len(times):
            return None  # the scheduler has come to its end, so this is another loop
        return self._by_time(pipe, schedule, times, place, time(), ROUNDED if called else SAME)

    @staticmethod
    def _by_time(
        pipe: DiffusionPipeline,
        schedule: Tensor,
        times: tuple[float, ...],
        place: int | None,
        time: float | None,
        tolerance: float,
    ) -> Running | None:
        if time is None:
            return None
        if place is None:
            place = min(range(len(times)), key=lambda index: abs(times[index] - time))
        return Running(weakref.ref(pipe), schedule, times, place) if abs(times[place] - time) <= tolerance else None

    def _times(self, pipe: DiffusionPipeline, schedule: Tensor) -> tuple[float, ...]:
        if self._known.schedule is not schedule:
            unit = pipe.scheduler.config.num_train_timesteps
            self._known.schedule, self._known.times = schedule, tuple(t / unit for t in schedule.tolist())
        return self._known.times


def _told(scheduler: Any) -> int | None:
    """The index of the step under way, as far as a scheduler knows."""
    index = getattr(scheduler, "step_index", None)
    return index if index is not None else getattr(scheduler, "begin_index", None)
