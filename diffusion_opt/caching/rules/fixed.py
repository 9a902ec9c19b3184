"""Schedules that are known before the run: every n-th step, or a mask.

The oldest caches recompute every n-th step and reuse between (FORA, Selvaraju et al. 2024, arXiv 2407.01425; DeepCache,
Ma et al. 2023, arXiv 2312.00858). A mask says it step by step, so it can be searched for, and moved to other libraries
(`interop`). Neither looks at the run: nothing is measured, no value is read back from the device, the same steps are
computed for every prompt, and the cost is known exactly beforehand. That makes them the harder rival for any rule that
does look.

A mask is honored to the letter. The safeguards of the cache do not apply to it: it may skip the last step, and while
there are fewer anchors than the predictor wants, the order is the one that they allow (one is reused, through two goes
a line). Only the first step must be computed. A run of another length is refused. A run that begins inside its
schedule, as image-to-image does, follows the entries from there on, and computes until there is an anchor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.step_cache import Rule
from diffusion_opt.caching.step.technique import StepCacheTechnique, check_predictor


class IntervalRule(Rule):
    """Computes a pass and skips the next `every - 1`."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._since = 0  # passes skipped since the last computed one

    @property
    def active(self) -> bool:
        return self.every > 1

    def start(self) -> None:
        self._since = 0

    def skip(self, stack: StackPass, forced: bool) -> bool:
        skip = not forced and self._since + 1 < self.every
        self._since = self._since + 1 if skip else 0
        return skip


class MaskRule(Rule):
    """Computes the passes that the mask names. A pass is known by its place in the schedule; without one, counted."""

    answers_for_itself = True

    def __init__(self, mask: tuple[bool, ...]) -> None:
        self.mask = mask
        self._next = 0

    @property
    def active(self) -> bool:
        return not all(self.mask)

    def start(self) -> None:
        self._next = 0

    def skip(self, stack: StackPass, forced: bool) -> bool:
        """Raises ValueError if the run has another number of steps than the mask."""
        index, num_steps = stack.step or (self._next, max(len(self.mask), self._next + 1))
        self._next = index + 1
        if num_steps != len(self.mask):
            raise ValueError(f"this mask is for {len(self.mask)} steps, this run has {num_steps}: make another mask")
        return not forced and not self.mask[index]


@dataclass(frozen=True, slots=True)
class FixedInterval(StepCacheTechnique):
    """Technique: compute every `every`-th step."""

    every: int  # 1: all, bit-identical
    predictor: PredictorName = "forecast"

    def __post_init__(self) -> None:
        check_predictor(self.predictor)
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"every must be 1 (compute all steps) or a larger integer, 3 for a start, got {self.every!r}"
            )

    def rule(self, pipe: DiffusionPipeline) -> IntervalRule:
        return IntervalRule(self.every)

    def describe(self) -> str:
        return f"one step in {self.every} computed, with {self.predictor}"


@dataclass(frozen=True, slots=True)
class FixedSchedule(StepCacheTechnique):
    """Technique: compute the steps that `mask` names, one entry for each of the scheduler's timesteps."""

    mask: Sequence[bool]  # True: compute; kept as a tuple
    predictor: PredictorName = "forecast"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", tuple(self.mask))
        check_predictor(self.predictor)
        if not self.mask or not self.mask[0]:
            raise ValueError(f"a mask must begin with a computed step, got {marks(self.mask) or 'an empty mask'}")

    def rule(self, pipe: DiffusionPipeline) -> MaskRule:
        return MaskRule(tuple(self.mask))

    def describe(self) -> str:
        return f"steps {marks(self.mask)} ({sum(self.mask)} of {len(self.mask)} computed) with {self.predictor}"


def marks(mask: Sequence[bool]) -> str:
    """A mask as text: # computed, . skipped."""
    return "".join("#" if computed else "." for computed in mask)
