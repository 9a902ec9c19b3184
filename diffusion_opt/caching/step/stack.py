"""Where a step cache cuts a transformer: at the two ends of its block stack.

A diffusion transformer is a thin head, a thick stack of blocks, and a thin tail. With h the token streams that the tail
reads (image tokens in FLUX.2 and SD3, video in Wan and LTX, video and audio in LTX-2; `models.block_stack` knows)

    h  = head(x_t)
    z  = blocks(h, text, t)            97 % of the arithmetic and more
    v  = tail(z, t)

so r = z - h, the residual of the whole stack, is all that a skipped step must supply. `StackCut` asks a controller at
each pass whether to run the blocks. If not, each block hands its inputs on untouched and the last one gives h + r. A
controller may have the first few blocks run before it is asked (`probe_blocks`), as a first-block cache does.

diffusers' own caches cut at each block and need a registry of what every block class takes and returns; its
FirstBlockCache can run neither FLUX.2 nor LTX-2. A cut at the stack needs none of that. The hooks are diffusers'
`ModelHook`s on the instances, so nothing is forked or patched on a class, `cache_context` reaches them as it reaches
any of its caches, and pipelines reset them after a call. One limit comes with them: a module with such hooks cannot be
deep-copied (the copy would run the blocks of the original), so trying to is an error here.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion_opt.caching.step.hooks import (
    InstanceHook,
    PassNames,
    arguments_of,
    check_removable,
    hook_on,
    put_hook,
    remove_hook,
)
from diffusion_opt.caching.step.running import Running, Whereabouts
from diffusion_opt.models.block_stack import BlockStack, Given, Streams, block_stack

HOOK_NAME = "diffusion_opt_step_cache"
COMPILED_HOOK_NAME = "diffusion_opt_compiled_schedule"  # of `compiled.py`, which runs the same blocks in its own way
REGION_HOOK_NAME = "diffusion_opt_region_cache"  # of `region/session.py`, which runs the blocks on some of the tokens


@dataclass(frozen=True, slots=True)
class StackPass:
    """One pass of the transformer, seen where its stack begins."""

    context: str | None  # the name given to `cache_context`: "cond" or "uncond" in diffusers' pipelines
    step: tuple[int, int] | None  # place in the schedule and its length: the scheduler's, else as the caller told
    time: float  # in [0, 1], 1 is noise
    sample: Float[Tensor, "b *s"]  # what the transformer was called with: the latent x_t, of LTX-2 the video's
    streams: Streams  # as they enter block 0: those that the tail reads, the main one first
    modulation: Callable[[], Tensor]  # gives `modulated`
    probe: Streams | None = None  # residual of the first `probe_blocks` blocks, if the controller asked for it
    running: Running | None = None  # the generation it belongs to, where a pipeline and its schedule are known

    @property
    def main(self) -> Float[Tensor, "b n d"]:
        """The first of the streams."""
        return next(iter(self.streams.values()))

    def modulated(self) -> Float[Tensor, "b n d"]:
        """The main stream as block 0's attention sees it: normalized, then scaled and shifted by the time."""
        return self.modulation()


class Controller(Protocol):
    """Decides over each pass of the stack, and learns what was computed."""

    probe_blocks: int  # blocks that run before `begin` is asked: 0, or 1 for a first-block cache

    def begin(self, stack: StackPass) -> Streams | None:
        """The residuals of the whole stack to use instead of the blocks, or None to run them."""
        ...

    def computed(self, stack: StackPass, residual: Streams) -> None:
        """The blocks ran and gave these residuals."""
        ...

    def finished(self, stack: StackPass, output: Tensor) -> None:
        """The transformer gave this output (of LTX-2 the video's), with the blocks computed or skipped."""
        ...

    def end_generation(self) -> None:
        """A pipeline call has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What a tensor looked like, without its values."""

    size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        """The shape of a tensor; anything else as it is."""
        return cls(tuple(value.shape), value.dtype, value.device) if torch.is_tensor(value) else value

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


class _Passes(threading.local):
    """The pass under way in this thread: None for one to leave alone, or before its stack began."""

    def __init__(self) -> None:
        self.call: dict[str, Any] | None = None  # context, step, time and sample of the pass
        self.stack: StackPass | None = None
        self.skipped: Streams | None = None  # residuals that replace the blocks
        self.last_skipped = False  # of the last stack that came to its end
        self.stand_in: Controller | None = None  # decides in a rehearsal


class StackCut:
    """The cut in one transformer: `attach` puts its hooks in place, `detach` takes every trace of them away.

    `pipe` is what loops without a pipeline are asked for (`running.py`). Raises ValueError, saying why, for a
    transformer that cannot be cut.
    """

    def __init__(self, transformer: nn.Module, controller: Controller, pipe: DiffusionPipeline | None = None) -> None:
        self.family: BlockStack = check_can_cut(transformer)
        self.whereabouts = Whereabouts(pipe)
        self.shapes: dict[str | None, Given] = {}  # of the last call in each context: tensors as a `Shape`
        self.now = _Passes()
        self._controller = controller
        if not 0 <= controller.probe_blocks < len(self.family.blocks):
            raise ValueError(
                f"of {len(self.family.blocks)} blocks, {controller.probe_blocks} cannot be probed and the rest skipped"
            )

    def attach(self, transformer: nn.Module) -> None:
        hooks = [_BlockHook(self, index) for index in range(len(self.family.blocks))]
        for module, hook in zip((transformer, *self.family.blocks), (_PassHook(self), *hooks), strict=True):
            put_hook(module, hook, HOOK_NAME)
        transformer._diffusers_hook.invalidate_child_registries_cache()

    def detach(self, transformer: nn.Module) -> None:
        modules = (*self.family.blocks, transformer)
        for module in modules:
            check_removable(module, HOOK_NAME)
        for module in modules:
            remove_hook(module, HOOK_NAME)
        transformer_hooks = getattr(transformer, "_diffusers_hook", None)
        if transformer_hooks is not None:
            transformer_hooks.invalidate_child_registries_cache()

    @property
    def controller(self) -> Controller:
        """Who decides: the controller given, or its stand-in during a rehearsal."""
        return self.now.stand_in or self._controller

    def rehearse(self, transformer: nn.Module, call: Given, controller: Controller) -> Any:
        """One pass under another controller, past all other hooks on the transformer, which learn nothing of it."""
        now, sample = self.now, self.family.sample(call)
        now.stand_in, now.call = controller, {"context": None, "step": None, "time": 0.0, "sample": sample}
        now.stack = now.skipped = None
        try:
            return type(transformer).forward(transformer, **call)
        finally:
            now.stand_in = now.call = now.stack = now.skipped = None


def check_can_cut(transformer: object) -> BlockStack:
    """The stack of this transformer. Raises ValueError, saying why, unless it can be cut and is free."""
    family = block_stack(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("diffusers' own cache is enabled on this transformer: call transformer.disable_cache() first")
    if attached_cut(transformer) is not None:
        raise ValueError("a step cache is already on this transformer: remove it before you apply another")
    if hook_on(transformer, COMPILED_HOOK_NAME) is not None:
        raise ValueError("a compiled schedule is already on this transformer: remove it before you apply another cache")
    check_whole_passes(transformer)
    return family


def check_whole_passes(transformer: object) -> None:
    """Raise ValueError if a region cache is on this transformer: its passes differ in their tokens."""
    if hook_on(transformer, REGION_HOOK_NAME) is not None:
        raise ValueError("a region cache is on this transformer, whose passes differ in size: remove it first")


def attached_cut(transformer: nn.Module) -> StackCut | None:
    """The cut that is on a transformer, if any."""
    hook = hook_on(transformer, HOOK_NAME)
    return None if hook is None else hook.cut


class _PassHook(InstanceHook):
    """On the transformer: notes context and time of a pass, and tells the controller its output and the end."""

    _is_stateful = True

    def __init__(self, cut: StackCut) -> None:
        super().__init__()
        self.cut = cut
        self.names = PassNames()

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        family, now = self.cut.family, self.cut.now
        call = arguments_of(module, args, kwargs)
        if reason := family.refusal(call):
            raise ValueError(reason)
        # Training, and batches of mixed times, are none of a cache's business: the blocks run as ever.
        time = None if torch.is_grad_enabled() or not family.is_ordinary(call) else family.time_of(call)
        if torch.is_grad_enabled() and not module.training:
            warnings.warn("gradients are on, so the step cache is off: sample under torch.no_grad()", stacklevel=2)
        now.stack = now.skipped = None
        now.call = None if time is None else self._identified(module, time, family.sample(call))
        if now.call is not None:
            self.cut.shapes[now.call["context"]] = tree_map(Shape.of, call)
        return args, kwargs

    def _identified(self, module: nn.Module, time: float, sample: Tensor) -> dict[str, Any]:
        running = self.cut.whereabouts.of(module, lambda: time)
        if running is None:
            return self.names.identify(time, sample)
        return self.names.identify(running.time, sample) | {"step": running.step, "running": running}

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        now = self.cut.now
        if now.stack is not None:  # None too if another hook spared this pass altogether
            self.cut.controller.finished(now.stack, self.cut.family.result(output))
        now.call = now.stack = now.skipped = None  # hold no tensor longer than the pass
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.names.forget()
        self.cut.controller.end_generation()
        return module


class _BlockHook(InstanceHook):
    """On each block: asks the controller where the probe ends, and hands inputs on if the stack is skipped."""

    def __init__(self, cut: StackCut, index: int) -> None:
        super().__init__()
        self.cut = cut
        self.index = index

    @torch.compiler.disable(recursive=False)  # decisions are taken in Python; the block itself may be compiled
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handed_on = self._before(module, args, kwargs)
        return self._after(self.fn_ref.original_forward(*args, **kwargs) if handed_on is None else handed_on)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the block is to hand on, or None for it to run."""
        now = self.cut.now
        if now.call is None:
            return None
        if self.index == 0:
            self._open(arguments_of(module, args, kwargs))
        return None if now.skipped is None else self.cut.family.handed_on(arguments_of(module, args, kwargs))

    @torch.compiler.disable
    def _after(self, output: Any) -> Any:
        """The block's output; what the stack gives if it is the last."""
        if self.cut.now.call is None:
            return output
        if self.index + 1 == self.cut.controller.probe_blocks:
            self._ask(replace(self.cut.now.stack, probe=self._residual(output)))
        return self._close(output) if self.index + 1 == len(self.cut.family.blocks) else output

    def _open(self, given: Given) -> None:
        family = self.cut.family
        stack = StackPass(
            **self.cut.now.call, streams=family.entering(given), modulation=lambda: family.modulated(given)
        )
        self.cut.now.stack = stack
        if not self.cut.controller.probe_blocks:
            self._ask(stack)

    def _ask(self, stack: StackPass) -> None:
        self.cut.now.stack = stack
        self.cut.now.skipped = self.cut.controller.begin(stack)

    def _close(self, output: Any) -> Any:
        now, family = self.cut.now, self.cut.family
        now.last_skipped = now.skipped is not None
        if now.skipped is None:
            self.cut.controller.computed(now.stack, self._residual(output))
            return output
        end = {name: start + now.skipped[name] for name, start in now.stack.streams.items()}
        return family.replaced(output, end)

    def _residual(self, output: Any) -> Streams:
        start = self.cut.now.stack.streams
        return {name: end - start[name] for name, end in self.cut.family.leaving(output, start).items()}
