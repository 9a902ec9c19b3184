"""A fixed schedule under torch.compile: two graphs, one that runs the blocks and one that has none.

A cache that decides while it runs stops the compiler at every pass: it reads a number off the device, compares, and
branches, so the graph breaks, CUDA graphs cannot be recorded, and the device waits. A mask known beforehand needs no
decision. With r the residual of the block stack (`stack.py`), two functions are enough,

    full(x, t, text)     ->  v, r            head, blocks, tail, and what the blocks added
    skip(x, t, text, r)  ->  v               head, + r, tail: no block is called, or even looped over

each compiled whole (`fullgraph=True`), and the mask says in plain Python which one a pass calls. Times come from the
scheduler's list, once a generation, so no pass waits for the device. The forecast between anchors is a weighted sum of
kept residuals and stays outside of the graphs.

`pass_functions.py` makes the two from the stock class. If the network is another one when a generation begins (an
adapter came or went, layers were replaced), they are made anew. Each kind of pass and each size is a graph of its own,
of which torch keeps 8 by default and then refuses; here it may keep more.
"""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map

from diffusion_opt.caching.rules.fixed import marks
from diffusion_opt.caching.step.generation import Generation, Moment
from diffusion_opt.caching.step.hooks import InstanceHook, PassNames, arguments_of, hook_on, put_hook, remove_hook
from diffusion_opt.caching.step.network import NetworkState
from diffusion_opt.caching.step.pass_functions import FullPass, SkippedPass
from diffusion_opt.caching.step.predictors import PREDICTORS, Anchor, Extrapolation, PredictorName, keep_anchor
from diffusion_opt.caching.step.report import StepCacheReport
from diffusion_opt.caching.step.running import Whereabouts
from diffusion_opt.caching.step.stack import COMPILED_HOOK_NAME, check_can_cut
from diffusion_opt.caching.step.technique import check_one_transformer, check_predictor
from diffusion_opt.models.block_stack import BlockStack

GRAPHS = 64  # of each of the two functions: kinds of pass times sizes


@dataclass(slots=True)
class _Run:
    """One generation, what each context has kept, and the network that the compiled passes were made of."""

    at: Generation
    anchors: dict[str, list[Anchor]] = field(default_factory=dict)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.run: _Run | None = None


class _ScheduleHook(InstanceHook):
    """On the transformer: calls one or the other compiled function, as the mask says."""

    _is_stateful = True

    def __init__(self, pipe: DiffusionPipeline, technique: "CompiledSchedule") -> None:
        super().__init__()
        self.family: BlockStack = check_can_cut(pipe.transformer)
        self.technique, self.mask = technique, technique.mask
        self.predictor: Extrapolation = PREDICTORS[technique.predictor]
        self.copies = technique.mode is not None  # a CUDA graph writes its results to one place at each replay
        self.names = PassNames()
        self.last_report = StepCacheReport({})
        self._whereabouts = Whereabouts(pipe)
        self._thread = _Thread()
        self._make(pipe.transformer)

    def _make(self, transformer: nn.Module) -> None:
        """The two functions of the network as it is now."""
        options = {"fullgraph": True, "backend": self.technique.backend, "mode": self.technique.mode}
        self.network = NetworkState(transformer)
        self.full = torch.compile(FullPass(transformer, self.family), **options)
        self.skip = torch.compile(SkippedPass(transformer, self.family), **options)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = arguments_of(module, args, kwargs)
        if reason := self.family.refusal(call):
            raise ValueError(reason)
        if torch.is_grad_enabled() or not self.family.is_ordinary(call):
            return self.fn_ref.original_forward(*args, **kwargs)
        moment, run = self._enter(module, call)
        anchors = run.anchors.setdefault(moment.context, [])
        computed = self.mask[moment.step[0]] or not anchors
        run.at.passes[moment.context].append((moment.time, computed))
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=8 * GRAPHS):
            if not computed:
                predicted = self.predictor.with_anchors(len(anchors)).predict(anchors, moment.time)
                return self._own(self.skip(call, predicted))
            output, residual = self._own(self.full(call))
        keep_anchor(anchors, Anchor(moment.time, residual), self.predictor.num_anchors)
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.names.forget()
        self.end_generation()
        return module

    def end_generation(self) -> None:
        """Drop the anchors, keep the report, and warn if nothing was skipped."""
        run, self._thread.run = self._thread.run, None
        if run is None:
            return
        self.last_report = StepCacheReport.of(run.at.passes)
        if not self.last_report.total_skipped:
            steps = max(self.last_report.computed.values())
            warnings.warn(f"the compiled schedule skipped none of {steps} steps", UserWarning, stacklevel=2)

    def report(self) -> StepCacheReport:
        """Of the generation under way in this thread, or of the last one that ended."""
        return self.last_report if self._thread.run is None else StepCacheReport.of(self._thread.run.at.passes)

    def _enter(self, module: nn.Module, call: dict[str, Any]) -> tuple[Moment, _Run]:
        """The generation a pass belongs to, a new one if need be; the device is waited for at its start at most."""
        running = self._whereabouts.of(module, lambda: self.family.time_of(call))
        if running is None:
            raise ValueError(
                "a compiled schedule follows a scheduler, and none stands at the time of this pass: call the pipeline, "
                "or set and step the scheduler of the pipeline that the schedule was applied to"
            )
        sample = self.family.sample(call)
        seen = self.names.identify(None, sample)
        moment = Moment.of(seen["context"], running.time, None, running, sample=sample)
        run = self._thread.run
        if run is None or not run.at.goes_on_with(moment):
            self.end_generation()
            if len(running.times) != len(self.mask):
                raise ValueError(
                    f"this schedule is for {len(self.mask)} timesteps, the scheduler has {len(running.times)}: "
                    "use it with the number of steps it was made for"
                )
            if NetworkState(module) != self.network:
                check_can_capture(module)
                self._make(module)
            run = self._thread.run = _Run(Generation.beginning(moment))
        elif run.at.is_other_kind(moment):
            run.anchors.pop(moment.context, None)
        run.at.note(moment)
        return moment, run

    def _own(self, results: Any) -> Any:
        """The results in memory of their own."""
        if not self.copies:
            return results
        return tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, results)


@dataclass(frozen=True, slots=True)
class CompiledSchedule:
    """Technique: compute the passes that a fixed mask says, and compile both kinds of pass whole.

    The mask has one entry for each of the scheduler's timesteps, and is honored to the letter as by `FixedSchedule`.
    """

    mask: Sequence[bool]  # True: compute
    predictor: PredictorName = "forecast"
    backend: str = "inductor"  # of torch.compile; "eager" captures the graphs and compiles nothing
    mode: str | None = None  # of torch.compile; "reduce-overhead" records CUDA graphs

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", tuple(bool(ran) for ran in self.mask))
        check_predictor(self.predictor)
        if not self.mask or not self.mask[0]:
            raise ValueError(f"a mask must begin with a computed step, got {marks(self.mask) or 'an empty mask'}")
        if all(self.mask):
            raise ValueError(f"the mask {marks(self.mask)} skips nothing: leave the technique out")

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Put the schedule on the pipeline's transformer and return the pipeline; the first passes compile.

        Raises ValueError if the transformer cannot be cut or captured, has a cache or another hook, or another one
        beside it.
        """
        check_one_transformer(pipe)
        check_can_cut(pipe.transformer)
        check_can_capture(pipe.transformer)
        others = list(getattr(getattr(pipe.transformer, "_diffusers_hook", None), "hooks", ()))
        if others:
            raise ValueError(
                f"the compiled passes would go past the hook {others[0]!r} on this transformer: take it off and put it "
                "on again after the compiled schedule"
            )
        put_hook(pipe.transformer, _ScheduleHook(pipe, self), COMPILED_HOOK_NAME)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the schedule off again. Raises ValueError if there is none."""
        if _attached(pipe) is None:
            raise ValueError("there is no compiled schedule on this pipeline to remove")
        remove_hook(pipe.transformer, COMPILED_HOOK_NAME)

    def describe(self) -> str:
        return f"compiled schedule {sum(self.mask)}/{len(self.mask)} with {self.predictor}"


def check_can_capture(transformer: nn.Module) -> None:
    """Raise ValueError, naming the layer, if a layer cannot be part of one whole graph.

    Layers say so by a method under `torch.compiler.disable`, as those that call into libraries of their own do;
    modelopt's quantizers branch on the numbers that they see.
    """
    for name, module in transformer.named_modules():
        kind = type(module)
        disabled = any(getattr(method, "_torchdynamo_disable", False) for method in vars(kind).values())
        if disabled or kind.__module__.startswith("modelopt."):
            raise ValueError(
                f"a compiled schedule captures each pass whole, and {name} is a {kind.__name__}, which cannot be "
                "captured: use FixedSchedule with the same mask, or weights in another format"
            )


def compiled_schedule_report(pipe: DiffusionPipeline) -> StepCacheReport:
    """What ran in the last generation. Raises ValueError if there is no compiled schedule."""
    hook = _attached(pipe)
    if hook is None:
        raise ValueError("there is no compiled schedule on this pipeline: apply a CompiledSchedule first")
    return hook.report()


def _attached(pipe: DiffusionPipeline) -> "_ScheduleHook | None":
    return hook_on(pipe.transformer, COMPILED_HOOK_NAME)
