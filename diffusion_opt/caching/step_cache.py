"""The core of every step cache: when to compute is a rule, what to use instead is a predictor, the rest is here.

    pass at time t:   run the blocks, r = out - h, keep (t, r)          if the rule or a safeguard says so
                      out = h + prediction from the kept anchors at t   otherwise

Safeguards, the same for all rules. The first steps are computed until the predictor has its anchors, and the last step
always (Liu et al. 2024, arXiv 2411.19108, do so too: errors there have no later step to heal in). With two-pass
guidance both passes share the decision taken on the first ("cond"), which halves the probes and keeps the guidance
difference consistent; anchors are kept for each pass by its own name. Nothing survives into a new generation: state is
dropped when a pipeline call ends, when time goes up, when the scheduler has new timesteps, and when shape, type or
device change. In doubt the blocks are computed.

The last step is known from `cache_context(step_index=, num_inference_steps=)` where the caller gives them, and from
the pipeline's scheduler otherwise. A custom loop that gives neither has no last step that is safe.
"""

import warnings
import weakref
from dataclasses import dataclass, field
from typing import Protocol

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.predictors import Anchor, Extrapolation
from diffusion_opt.caching.stack import StackInput, attached_cut

DEFAULT_CONTEXT = "default"  # of passes outside any `cache_context`
TIMESTEP_SCALE = 1000  # FLUX.2's pipelines divide the scheduler's timesteps by this


class Rule(Protocol):
    """Decides which steps are skipped. Sees the passes of one context only, in order of falling time."""

    @property
    def active(self) -> bool:
        """Whether it may ever skip, with the settings it has."""
        ...

    def start(self, pipe: DiffusionPipeline | None) -> None:
        """Forget everything: a new generation begins. May raise ValueError if the rule is not meant for it."""
        ...

    def skip(self, stack: StackInput, forced: bool) -> bool:
        """Whether this pass is skipped; never if `forced`, but what it saw of the pass counts."""
        ...


@dataclass(frozen=True, slots=True)
class StepCacheReport:
    """What a cache did in one generation: for each context the times of its passes, and whether each was computed."""

    passes: dict[str, tuple[tuple[float, bool], ...]]

    @property
    def computed(self) -> dict[str, int]:
        return {name: sum(ran for _, ran in passes) for name, passes in self.passes.items()}

    @property
    def skipped(self) -> dict[str, int]:
        return {name: sum(not ran for _, ran in passes) for name, passes in self.passes.items()}

    @property
    def total_computed(self) -> int:
        return sum(self.computed.values())

    @property
    def total_skipped(self) -> int:
        return sum(self.skipped.values())

    def __str__(self) -> str:
        parts = (
            f"{name}: {self.computed[name]} computed, {self.skipped[name]} skipped [" + "".join(
                "#" if ran else "." for _, ran in passes) + "]"
            for name, passes in self.passes.items()
        )  # fmt: skip
        return "; ".join(parts) or "no passes yet"


@dataclass(slots=True)
class _Generation:
    """State of one generation: anchors and passes of each context, and the decision of the step under way."""

    schedule: object  # the scheduler's timesteps; a new generation gets a new tensor
    start: float  # the time it began at
    leader: str
    time: float
    skip: bool = False
    anchors: dict[str, list[Anchor]] = field(default_factory=dict)
    passes: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)


class StepCache:
    """A controller of a `StackCut`: rule and predictor, with the state of one generation at a time.

    The pipeline is referred to weakly and may be None; it is asked for its scheduler.
    """

    def __init__(self, rule: Rule, predictor: Extrapolation, pipe: DiffusionPipeline | None = None) -> None:
        self.rule = rule
        self.predictor = predictor
        self.last_report = StepCacheReport({})
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._generation: _Generation | None = None

    def begin(self, stack: StackInput) -> Float[Tensor, "b n d"] | None:
        name = stack.context or DEFAULT_CONTEXT
        if self._is_new(name, stack):
            self.end_generation()
            self.rule.start(self._pipe())
            self._generation = _Generation(self._schedule(), stack.time, leader=name, time=stack.time)
        now = self._generation
        anchors = now.anchors.setdefault(name, [])
        ready = len(anchors) >= self.predictor.num_anchors
        if name == now.leader:
            now.time = stack.time
            now.skip = self.rule.skip(stack, forced=not ready or self._is_last(stack))
        elif stack.time != now.time:  # the leader sat this step out, so there is no decision to follow
            now.time, now.skip = stack.time, False
        skipped = now.skip and ready
        now.passes.setdefault(name, []).append((stack.time, not skipped))
        return self.predictor.predict(anchors, stack.time) if skipped else None

    def computed(self, stack: StackInput, residual: Float[Tensor, "b n d"]) -> None:
        anchors = self._generation.anchors[stack.context or DEFAULT_CONTEXT]
        if anchors and anchors[-1].time == stack.time:  # a scheduler that calls twice at one time
            anchors.pop()
        anchors.append(Anchor(stack.time, residual))
        del anchors[: -self.predictor.num_anchors]

    def end_generation(self) -> None:
        """Drop the anchors, keep the report, and warn if a cache that should have skipped never did."""
        if self._generation is None:
            return
        self.last_report = self.report()
        self._generation = None
        if self.rule.active and not self.last_report.total_skipped:
            steps = max(self.last_report.computed.values())
            least = self.predictor.num_anchors + 2
            why = (
                f"{steps} steps are too few, {least} are the least for this predictor"
                if steps < least
                else "raise its threshold"
            )
            warnings.warn(f"the step cache skipped none of {steps} steps: {why}", UserWarning, stacklevel=2)

    def report(self) -> StepCacheReport:
        """Of the generation under way, or of the last one."""
        if self._generation is None:
            return self.last_report
        return StepCacheReport({name: tuple(passes) for name, passes in self._generation.passes.items()})

    def _is_new(self, name: str, stack: StackInput) -> bool:
        now = self._generation
        if now is None or stack.time > now.time or self._schedule() is not now.schedule:
            return True
        if stack.time == now.start and now.passes.get(name):  # back at the start: another generation of one step
            return True
        anchors = now.anchors.get(name)
        return bool(anchors) and _kind(anchors[-1].residual) != _kind(stack.hidden)

    def _schedule(self) -> object:
        pipe = self._pipe()
        return None if pipe is None else pipe.scheduler.timesteps

    def _is_last(self, stack: StackInput) -> bool:
        if stack.step is not None:
            index, num_steps = stack.step
            return index >= num_steps - 1
        pipe = self._pipe()
        if pipe is None:
            return False
        return stack.time <= float(pipe.scheduler.timesteps[-1]) / TIMESTEP_SCALE * (1 + 1e-3)


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def step_cache_report(pipe: DiffusionPipeline) -> StepCacheReport:
    """What the step cache on a pipeline did in its last generation. Raises ValueError if there is no step cache."""
    cut = attached_cut(pipe.transformer)
    if cut is None or not isinstance(cut.controller, StepCache):
        raise ValueError(
            "there is no step cache on this pipeline: apply one first, for example TeaCache(threshold=0.1)"
        )
    return cut.controller.report()
