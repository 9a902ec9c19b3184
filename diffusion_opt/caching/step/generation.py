"""One generation seen as passes in time: where it begins, which step is the last, and what was computed in it.

Every cache forgets between generations, and a cache that does not notice a new one gives the last prompt's picture to
the next. A generation ends with the pipeline's call. Loops without a pipeline, calls that were interrupted and
pipelines that tell nobody (SD3's) are caught by what a new one changes, and in doubt it is new:

    time goes up, or is back at the start            the scheduler holds new timesteps
    shape, type or device of the streams changes     the step index falls, or the number of steps is another

The last step is known from `cache_context(step_index=, num_inference_steps=)` where the caller gives them, and from
the pipeline's scheduler otherwise. A custom loop that gives neither has no last step that is safe.
"""

import weakref
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from torch import Tensor

DEFAULT_CONTEXT = "default"  # of passes that nobody named


@dataclass(frozen=True, slots=True)
class Kind:
    """What tensors must share for one to stand in for the other."""

    tensors: tuple[tuple, ...]

    @classmethod
    def of(cls, streams: dict[str, Tensor]) -> "Kind":
        return cls(tuple((name, *_kind(tensor)) for name, tensor in streams.items()))


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


@dataclass(slots=True)
class Generation:
    """One generation under way: its passes by context, as (time, whether it was computed)."""

    schedule: object  # the scheduler's timesteps; a new generation gets a new tensor
    start: float  # the time it began at
    end: float | None  # the time of the scheduler's last step
    leader: str  # the context of its first pass, on which decisions are taken
    time: float  # of the pass under way
    step: tuple[int, int] | None = None  # of the pass under way, where the caller told it
    passes: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether no step comes after the one under way."""
        if self.step is not None:
            index, num_steps = self.step
            return index >= num_steps - 1
        return self.end is not None and self.time <= self.end * (1 + 1e-3)

    def note(self, name: str, time: float, step: tuple[int, int] | None, kind: Kind) -> None:
        """A pass of it begins."""
        self.time, self.step = time, step
        self.kinds[name] = kind
        self.passes.setdefault(name, [])


class Schedule:
    """What is known of the steps to come: the scheduler of a pipeline, which is referred to weakly and may be None."""

    def __init__(self, pipe: DiffusionPipeline | None) -> None:
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)

    @property
    def pipe(self) -> DiffusionPipeline | None:
        return self._pipe()

    def is_new(self, now: Generation | None, name: str, time: float, step: tuple[int, int] | None, kind: Kind) -> bool:
        """Whether a pass does not belong to the generation under way."""
        if now is None or time > now.time or self._timesteps() is not now.schedule:
            return True
        if time == now.start and now.passes.get(name):  # back at the start, after a single step
            return True
        if step is not None and now.step is not None and (step[1] != now.step[1] or step[0] < now.step[0]):
            return True
        return name in now.kinds and now.kinds[name] != kind

    def begin(self, name: str, time: float) -> Generation:
        """A generation whose first pass is this one."""
        pipe = self.pipe
        end = None if pipe is None else float(pipe.scheduler.timesteps[-1]) / pipe.scheduler.config.num_train_timesteps
        return Generation(self._timesteps(), start=time, end=end, leader=name, time=time)

    def _timesteps(self) -> object:
        pipe = self.pipe
        return None if pipe is None else pipe.scheduler.timesteps
