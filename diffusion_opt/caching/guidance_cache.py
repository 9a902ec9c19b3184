"""Leave out guidance passes: where guidance should not count, and where its difference can be forecast.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) runs the network twice a step, with the prompt and
without, and most of the time the two differ by little that changes slowly:

    v = v_c + (w - 1) d(t),     d(t) = v_c - v_u

So the second pass is computed at every n-th step only, and d is forecast between from its last values, as a polynomial
in time (`predictors.py`). The pass with the prompt always runs, hence the picture follows the prompt as before. What
stands in for the spared pass is v_u = v_c - d(t): pipelines and guidance formulas need not know. It saves at most half
of the passes, and nothing on guidance-distilled models, which have no second pass.

Outside `interval` there is no guidance at all: v_u = v_c, whatever w is (Kynkäänniemi et al. 2024, arXiv 2404.07724).
At the noisiest times it narrows what a picture may become before there is anything to see; without it there, pictures
are more varied, and passes are saved besides. Where guidance is strong enough to harm, their distribution also comes
nearer to that of the data (`benchmarks/sampling_steps.py`: at scale 2 it does, at 1.5 hardly).

This is a relative of FasterCache's guidance part (Lv et al. 2024, arXiv 2410.19355), which reuses d in two frequency
bands with hand-set weights. It serves both ways in which pipelines run guidance:

    separate passes      FLUX.2 [klein], Wan: the first pass of a step counts as the one with the prompt, all others are
                         spared. LTX-2's further guidances (spatio-temporal, modality) are such passes too
    one doubled batch    SD3, LTX, LTX-2: (without prompt, with prompt) in one pass, told by what the calling pipeline
                         says of its guidance and by two equal halves of the latent. A spared step runs the second half

Together with a step cache: a guidance pass is computed only where the step cache computed the first one, and every
n-th of those, so that d is always the difference of two passes that really ran. A step cache keeps whole batches, so
over one doubled batches are not halved: guidance still has no effect outside the interval, but costs what it did.
"""

import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion_opt.caching.step.generation import Generation, Moment
from diffusion_opt.caching.step.hooks import InstanceHook, PassNames, arguments_of, hook_on, put_hook, remove_hook
from diffusion_opt.caching.step.predictors import PREDICTORS, Anchor, Extrapolation, PredictorName, keep_anchor
from diffusion_opt.caching.step.report import StepCacheReport
from diffusion_opt.caching.step.running import Whereabouts
from diffusion_opt.caching.step.stack import COMPILED_HOOK_NAME, attached_cut, check_whole_passes
from diffusion_opt.caching.step.technique import check_one_transformer, check_predictor
from diffusion_opt.flow.velocity import ALL_TIMES, check_interval
from diffusion_opt.models.block_stack import BlockStack, block_stack

HOOK_NAME = "diffusion_opt_guidance_cache"
UNPROMPTED = "uncond"  # name of the first half of a doubled batch in reports


@dataclass(frozen=True, slots=True)
class GuidanceCache:
    """Technique: compute guidance passes at every `every`-th step and forecast their difference between.

    `interval` holds the times t (1 is noise), both ends included, at which guidance counts; at others it has no effect
    and costs nothing.
    """

    every: int = 2  # steps; 1: none is left out inside the interval, bit-identical if that is all times
    predictor: PredictorName = "forecast"
    interval: Sequence[float] = ALL_TIMES

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be 1 (leave out nothing) or more, 2 for a start, got {self.every}")
        check_predictor(self.predictor)
        object.__setattr__(self, "interval", check_interval(tuple(self.interval)))

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Put the cache on the pipeline's transformer and return the pipeline.

        Raises ValueError for a transformer of an unknown family or with a guidance cache or a region cache on it, and
        for a pipeline with a second transformer.
        """
        check_one_transformer(pipe)
        check_whole_passes(pipe.transformer)
        if type(block_stack(pipe.transformer)).result is not BlockStack.result:
            raise ValueError(
                f"{type(pipe.transformer).__name__} returns its samples in a list, and the guidance cache serves "
                "transformers that return them as one tensor"
            )
        hook = _GuidanceHook(pipe, self)
        if _attached(pipe) is not None:
            raise ValueError("a guidance cache is already on this transformer: remove it before you apply another")
        put_hook(pipe.transformer, hook, HOOK_NAME)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the cache off again. Raises ValueError if there is none."""
        if _attached(pipe) is None:
            raise ValueError("there is no guidance cache on this pipeline to remove")
        remove_hook(pipe.transformer, HOOK_NAME)

    def describe(self) -> str:
        how = "guidance" if self.every == 1 else f"guidance at every {self.every}. step with {self.predictor}"
        return how if self.interval == ALL_TIMES else f"{how} from t = {self.interval[0]:g} to {self.interval[1]:g}"


def guidance_cache_report(pipe: DiffusionPipeline) -> StepCacheReport:
    """Which passes of the last generation ran. Raises ValueError if there is no guidance cache."""
    hook = _attached(pipe)
    if hook is None:
        raise ValueError("there is no guidance cache on this pipeline: apply one first, for example GuidanceCache()")
    return hook.report()


def _attached(pipe: DiffusionPipeline) -> "_GuidanceHook | None":
    return hook_on(pipe.transformer, HOOK_NAME)


@dataclass(slots=True)
class _State:
    """One generation: the first pass of the step under way, and the differences of each guidance pass to it."""

    at: Generation
    first: tuple[Tensor, ...] = ()  # its outputs
    form: type = tuple  # what they came in
    first_time: float | None = None
    first_ran: bool = False  # and was not skipped by a step cache
    num_ran: int = 0
    whole: bool = False  # doubled batches are not halved, for a step cache beneath keeps them
    differences: dict[str, list[Anchor]] = field(default_factory=dict)

    def in_form(self, outputs: Iterable[Tensor]) -> Any:
        """Outputs in the form of the first pass."""
        outputs = tuple(outputs)
        return outputs if self.form is tuple else self.form(*outputs)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.state: _State | None = None


class _GuidanceHook(InstanceHook):
    """On the transformer: runs the first pass of a step, and the others when they are due."""

    _is_stateful = True

    def __init__(self, pipe: DiffusionPipeline, technique: GuidanceCache) -> None:
        super().__init__()
        self.family = block_stack(pipe.transformer)
        self.technique = technique
        self.predictor: Extrapolation = PREDICTORS[technique.predictor]
        self.names = PassNames()
        self.last_report = StepCacheReport({})
        self._whereabouts = Whereabouts(pipe)
        self._thread = _Thread()

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.fn_ref.original_forward
        call = arguments_of(module, args, kwargs)
        if torch.is_grad_enabled() or not self.family.is_ordinary(call):
            return run(*args, **kwargs)
        time, sample = self.family.time_of(call), self.family.sample(call)
        if time is None:
            return run(*args, **kwargs)
        moment, state = self._enter(module, time, sample)
        name, time = moment.context, moment.time
        if name == state.at.leader:
            state.at.passes[name].append((time, True))
            if _is_doubled(moment, sample):
                return self._doubled(state, module, time, call, len(sample) // 2)
            output = run(*args, **kwargs)
            self._keep_first(state, module, time, output)
            return output
        if self._is_outside(time) and state.first_time == time:
            state.at.passes[name].append((time, False))
            return self._without_effect(state, len(sample))
        computed = self._is_due(state, name, time)
        state.at.passes[name].append((time, computed))
        if computed:
            output = run(*args, **kwargs)
            self._keep_difference(state, name, time, _tensors(output))
            return output
        return state.in_form(self._forecast(state, name, time))

    def _doubled(self, state: _State, module: nn.Module, time: float, call: dict[str, Any], half: int) -> Any:
        """A step whose pass holds both halves: the one with the prompt always runs."""
        passes, run = state.at.passes.setdefault(UNPROMPTED, []), self.fn_ref.original_forward
        whole = attached_cut(module) is not None or hook_on(module, COMPILED_HOOK_NAME) is not None
        outside = self._is_outside(time)
        state.first_time, state.first_ran = time, True
        spared = outside or not self._is_due(state, UNPROMPTED, time, coming=1)
        state.whole = whole
        if whole or not spared:
            output = run(**call)
            self._keep_first(state, module, time, output, slice(half, None))
            passes.append((time, True))
            if outside:
                return state.in_form(torch.cat([prompted, prompted]) for prompted in state.first)
            self._keep_difference(state, UNPROMPTED, time, tuple(part[:half] for part in _tensors(output)))
            return output
        output = run(**_second_half(call, 2 * half))
        self._keep_first(state, module, time, output)
        passes.append((time, False))
        unprompted = state.first if outside else self._forecast(state, UNPROMPTED, time)
        return state.in_form(torch.cat(pair) for pair in zip(unprompted, state.first, strict=True))

    def _is_outside(self, time: float) -> bool:
        low, high = self.technique.interval
        return not low <= time <= high

    def _is_due(self, state: _State, name: str, time: float, coming: int = 0) -> bool:
        """Whether a guidance pass is computed; `coming` first passes of this step are still to be counted."""
        ready = len(state.differences.get(name, ())) >= self.predictor.num_anchors and state.first_time == time
        due = state.first_ran and (state.num_ran + coming - 1) % self.technique.every == 0
        return not ready or due or state.at.is_last

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.names.forget()
        self.end_generation()
        return module

    def end_generation(self) -> None:
        """Drop the differences, keep the report, and warn if nothing was left out."""
        state, self._thread.state = self._thread.state, None
        if state is None:
            return
        self.last_report = StepCacheReport.of(state.at.passes)
        every, interval = self.technique.every, self.technique.interval
        if (every == 1 and interval == ALL_TIMES) or self.last_report.total_skipped:
            return
        if len(state.at.passes) == 1:
            why = "each step was a single pass (guidance is off, distilled, or batched and the pipeline does not tell)"
        elif state.whole:
            why = "a step cache is on the transformer, and it keeps whole batches"
        elif every == 1:
            why = f"no step lies outside t = {interval[0]:g} to {interval[1]:g}"
        else:
            why = f"{len(state.at.passes[state.at.leader])} steps are too few"
        warnings.warn(f"the guidance cache left out no pass: {why}", UserWarning, stacklevel=2)

    def report(self) -> StepCacheReport:
        """Of the generation under way in this thread, or of the last one that ended."""
        state = self._thread.state
        return self.last_report if state is None else StepCacheReport.of(state.at.passes)

    def _enter(self, module: nn.Module, time: float, sample: Tensor) -> tuple[Moment, _State]:
        running = self._whereabouts.of(module, lambda: time)
        seen = self.names.identify(time if running is None else running.time, sample)
        moment = Moment.of(seen["context"], seen["time"], seen["step"], running, sample=sample)
        state = self._thread.state
        if state is None or not state.at.goes_on_with(moment):
            self.end_generation()
            state = self._thread.state = _State(Generation.beginning(moment))
        elif state.at.is_other_kind(moment):
            state.differences.clear()
        state.at.note(moment)
        return moment, state

    def _keep_first(
        self, state: _State, module: nn.Module, time: float, output: Any, prompted: slice = slice(None)
    ) -> None:
        cut = attached_cut(module)
        state.first, state.form = tuple(part[prompted] for part in _tensors(output)), type(output)
        state.first_time = time
        state.first_ran = cut is None or not cut.now.last_skipped
        state.num_ran += state.first_ran

    def _keep_difference(self, state: _State, name: str, time: float, outputs: tuple[Tensor, ...]) -> None:
        if state.first_time != time or not state.first_ran:
            return
        pairs = zip(state.first, outputs, strict=True)
        difference = {str(i): first[-len(own) :] - own for i, (first, own) in enumerate(pairs)}
        keep_anchor(state.differences.setdefault(name, []), Anchor(time, difference), self.predictor.num_anchors)

    def _forecast(self, state: _State, name: str, time: float) -> tuple[Tensor, ...]:
        """The outputs of the spared pass."""
        predicted = self.predictor.predict(state.differences[name], time).values()
        return tuple(first[-len(d) :] - d for first, d in zip(state.first, predicted, strict=True))

    def _without_effect(self, state: _State, batch: int) -> Any:
        """The outputs of the first pass once more: their difference, and with it guidance, is nothing."""
        return state.in_form(first[-batch:] for first in state.first)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else output.to_tuple()


def _is_doubled(moment: Moment, sample: Tensor) -> bool:
    """Whether a pass holds a batch twice, without and with the prompt, as far as its pipeline says so."""
    pipe = None if moment.running is None else moment.running.pipe
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    if moment.context == "cond_uncond":  # CogVideoX says it by the name of the pass and by its scale
        guided = guided or float(getattr(pipe, "guidance_scale", None) or 1.0) > 1
    if moment.context in ("cond", "uncond") or not guided:
        return False
    return len(sample) % 2 == 0 and bool(torch.equal(*sample.chunk(2)))


def _second_half(call: dict[str, Any], batch: int) -> dict[str, Any]:
    """The arguments of the half with the prompt; position ids and rotations are no samples."""

    def half(leaf: Any) -> Any:
        return leaf[batch // 2 :] if torch.is_tensor(leaf) and leaf.ndim and len(leaf) == batch else leaf

    return {
        name: value if name.endswith("_ids") or "rotary" in name else tree_map(half, value)
        for name, value in call.items()
    }
