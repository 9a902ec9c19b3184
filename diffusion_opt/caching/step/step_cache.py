"""The core of every step cache: when to compute is a rule, what to use instead is a predictor, the rest is here.

    pass at time t:   run the blocks, r = out - h, keep (t, r)          if the rule or a safeguard says so
                      out = h + prediction from the kept anchors at t   otherwise

Safeguards, the same for all rules. The first steps are computed until the predictor has its anchors, and the last step
always (Liu et al. 2024, arXiv 2411.19108, do so too: errors there have no later step to heal in). Only a mask, which
was made with these steps in view, answers for itself: it may skip as soon as there is one anchor. With two-pass
guidance both passes share the decision taken on the first ("cond"), which halves the probes and keeps the guidance
difference consistent; anchors are kept for each pass by its own name. Nothing survives into a new generation
(`generation.py`); each thread has a generation of its own. In doubt the blocks are computed.

Where the rule had some blocks run to look at their residual, that part is known and only the rest is predicted: with
reuse this is ParaAttention's first-block cache, out = out_1 + (r - r_1) of the last computed pass.
"""

import copy
import threading
import warnings
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from diffusion_opt.caching.step.generation import DEFAULT_CONTEXT, Generation, Moment
from diffusion_opt.caching.step.predictors import Anchor, Extrapolation, keep_anchor
from diffusion_opt.caching.step.report import StepCacheReport
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.models.block_stack import Streams


class Rule(Protocol):
    """Decides which steps are skipped. Sees the passes of one context only, in order of falling time.

    A rule inherits from this and writes what it needs: `skip`, and `start` if it remembers anything.
    """

    probe_blocks: int = 0  # blocks that always run, so that `skip` can look at their residual in `stack.probe`
    answers_for_itself: bool = False  # True: it is forced only where there is no anchor at all

    @property
    def active(self) -> bool:
        """Whether it may ever skip, with the settings it has."""
        return True

    def check(self, stack: StackPass) -> None:
        """Raise ValueError if the rule is not meant for the generation that begins with this pass."""

    def start(self) -> None:
        """Forget everything: a new generation begins, or nothing that was seen of this one compares with the rest."""

    def skip(self, stack: StackPass, forced: bool) -> bool:
        """Whether this pass is skipped; never if `forced`, but what it saw of the pass counts."""
        ...

    def computed(self, stack: StackPass, residual: Streams) -> None:
        """A pass was computed and gave these residuals of the whole stack."""

    def finished(self, stack: StackPass, output: Tensor) -> None:
        """A pass, computed or skipped, has ended with this output of the transformer."""


@dataclass(slots=True)
class _State:
    """What one generation has: where it is, the anchors of each context, and the decision of the step under way."""

    at: Generation
    skip: bool = False
    decided: float | None = None  # time of the decision
    anchors: dict[str, list[Anchor]] = field(default_factory=dict)
    concluded: bool = False


class _Thread(threading.local):
    """State of one thread, and its own copy of the rule."""

    def __init__(self) -> None:
        self.state: _State | None = None
        self.rule: Rule | None = None


class StepCache:
    """A controller of a `StackCut`: rule and predictor, with the state of one generation in each thread.

    The thread that makes a cache uses the rule it was given, any other one a copy.
    """

    def __init__(self, rule: Rule, predictor: Extrapolation) -> None:
        self.predictor = predictor
        self.probe_blocks = rule.probe_blocks
        self.last_report = StepCacheReport({})
        self._fresh_rule = copy.deepcopy(rule)
        self._thread = _Thread()
        self._thread.rule = rule

    @property
    def rule(self) -> Rule:
        """The rule of this thread."""
        if self._thread.rule is None:
            self._thread.rule = copy.deepcopy(self._fresh_rule)
        return self._thread.rule

    def begin(self, stack: StackPass) -> Streams | None:
        name, state = stack.context or DEFAULT_CONTEXT, self._enter(stack)
        anchors = state.anchors.setdefault(name, [])
        alone = self.rule.answers_for_itself
        ready = len(anchors) >= (1 if alone else self.predictor.num_anchors)
        if name == state.at.leader:
            state.decided = stack.time
            state.skip = self.rule.skip(stack, forced=not ready or (state.at.is_last and not alone))
        elif stack.time != state.decided:  # the leader sat this step out, so there is no decision to follow
            state.decided, state.skip = stack.time, False
        skipped = state.skip and ready
        state.at.passes[name].append((stack.time, not skipped))
        if not skipped:
            return None
        predicted = self.predictor.with_anchors(len(anchors)).predict(anchors, stack.time)
        if stack.probe is None:
            return predicted
        return {stream: rest + stack.probe[stream] for stream, rest in predicted.items()}

    def computed(self, stack: StackPass, residual: Streams) -> None:
        state = self._thread.state
        name = stack.context or DEFAULT_CONTEXT
        if name == state.at.leader:
            self.rule.computed(stack, residual)
        rest = residual
        if stack.probe is not None:
            rest = {stream: whole - stack.probe[stream] for stream, whole in residual.items()}
        anchors = state.anchors[name]
        keep_anchor(anchors, Anchor(stack.time, rest), self.predictor.num_anchors)

    def finished(self, stack: StackPass, output: Tensor) -> None:
        state = self._thread.state
        name = stack.context or DEFAULT_CONTEXT
        if name == state.at.leader:
            self.rule.finished(stack, output)
        if state.at.is_last:
            state.anchors[name] = []  # nothing comes that could use them
            self._conclude(state)

    def end_generation(self) -> None:
        """Drop the anchors, keep the report, and warn if a cache that should have skipped never did."""
        state, self._thread.state = self._thread.state, None
        if state is not None:
            self.last_report = StepCacheReport.of(state.at.passes)
            self._conclude(state)

    def report(self) -> StepCacheReport:
        """Of the generation under way in this thread, or of the last one that ended."""
        state = self._thread.state
        return self.last_report if state is None else StepCacheReport.of(state.at.passes)

    def _enter(self, stack: StackPass) -> _State:
        """The state of the generation that a pass belongs to, a new one if need be."""
        moment = Moment.of(stack.context, stack.time, stack.step, stack.running, **stack.streams)
        state = self._thread.state
        if state is None or not state.at.goes_on_with(moment):
            self.end_generation()
            self.rule.check(stack)
            self.rule.start()
            state = self._thread.state = _State(Generation.beginning(moment))
        elif state.at.is_other_kind(moment):
            state.anchors.pop(moment.context, None)
            if moment.context == state.at.leader:
                self.rule.start()
        state.at.note(moment)
        return state

    def _conclude(self, state: _State) -> None:
        """Once a generation is over: warn if nothing was skipped although the rule should have."""
        report = StepCacheReport.of(state.at.passes)
        if state.concluded or not self.rule.active or report.total_skipped:
            return
        state.concluded = True
        steps = max(report.computed.values())
        least = self.predictor.num_anchors + 2
        why = (
            f"{steps} steps are too few, {least} are the least for this predictor"
            if steps < least
            else "raise its threshold, or let it compute fewer steps"
        )
        warnings.warn(f"the step cache skipped none of {steps} steps: {why}", UserWarning, stacklevel=2)
