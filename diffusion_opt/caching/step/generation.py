"""One generation seen as passes in time: where it begins, which step is the last, and what was computed in it.

Every cache forgets between generations, and a cache that does not notice a new one gives the last prompt's picture to
the next. A generation ends with the pipeline's call. Loops without a pipeline, calls that were interrupted and
pipelines that tell nobody (SD3's) are caught by what a new one changes, and in doubt it is new:

    another pipeline is calling                      its scheduler holds new timesteps (`running.py`)
    time goes up, or is back at the start            the step index falls, or the number of steps is another

Streams of another shape, type or device are a new generation in a loop of one's own. In a pipeline whose schedule goes
on they are the same one, of which nothing that was kept can be used: guidance that was batched and has been switched
off leaves half of the samples.
"""

from dataclasses import dataclass, field

from torch import Tensor

from diffusion_opt.caching.step.running import Running

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


@dataclass(frozen=True, slots=True)
class Moment:
    """Where one pass stands."""

    context: str
    time: float  # in [0, 1]
    step: tuple[int, int] | None  # place in the schedule and its length, where they are known
    kind: Kind
    running: Running | None = None  # None: no pipeline and no schedule that fits is known

    @classmethod
    def of(
        cls, context: str | None, time: float, step: tuple[int, int] | None, running: Running | None, **streams: Tensor
    ) -> "Moment":
        """The moment of a pass; what the schedule says goes before what a caller said."""
        return cls(context or DEFAULT_CONTEXT, time, running.step if running else step, Kind.of(streams), running)


@dataclass(slots=True)
class Generation:
    """One generation under way: its passes by context, as (time, whether it was computed)."""

    first: Moment  # on its context decisions are taken
    now: Moment  # the pass under way
    passes: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)

    @classmethod
    def beginning(cls, moment: Moment) -> "Generation":
        return cls(moment, moment)

    @property
    def leader(self) -> str:
        """The context of its first pass."""
        return self.first.context

    @property
    def is_last(self) -> bool:
        """Whether no step comes after the one under way; False where nobody knows."""
        return self.now.step is not None and self.now.step[0] >= self.now.step[1] - 1

    def goes_on_with(self, moment: Moment) -> bool:
        """Whether a pass belongs to this generation."""
        return not (
            self._other_schedule(moment)
            or _is_before(moment, self.now)
            or (_is_at(moment, self.first) and bool(self.passes.get(moment.context)))  # back at the start
            or (moment.running is None and self.is_other_kind(moment))
        )

    def is_other_kind(self, moment: Moment) -> bool:
        """Whether what was kept of this context cannot stand in for what the pass would compute."""
        return self.kinds.get(moment.context, moment.kind) != moment.kind

    def note(self, moment: Moment) -> None:
        """A pass of it begins."""
        self.now = moment
        self.kinds[moment.context] = moment.kind
        self.passes.setdefault(moment.context, [])

    def _other_schedule(self, moment: Moment) -> bool:
        mine, its = self.now.running, moment.running
        if mine is None or its is None:
            return mine is not its
        return mine.of_pipe is not its.of_pipe or mine.schedule is not its.schedule


def _is_before(one: Moment, other: Moment) -> bool:
    """Whether a pass is earlier in a schedule than another, which came first: then it is of another schedule."""
    if one.step is not None and other.step is not None:
        return one.step[0] < other.step[0] or one.step[1] != other.step[1]
    return one.time > other.time


def _is_at(one: Moment, other: Moment) -> bool:
    if one.step is not None and other.step is not None:
        return one.step == other.step
    return one.time == other.time
