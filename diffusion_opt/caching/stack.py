"""Where a step cache cuts a transformer: at the two ends of its block stack.

A diffusion transformer is a thin head, a thick stack of blocks, and a thin tail. In FLUX.2

    h, c = x_embedder(x_t), context_embedder(text)            head: image tokens h, text tokens c
    c, h = transformer_blocks(h, c);  z = single_transformer_blocks(cat[c, h])        97 % of the arithmetic and more
    v    = proj_out(norm_out(z[image]))                       tail

so r = z[image] - h, the residual of the whole stack, is all that a skipped step must supply (the text tokens are
dropped after the stack). `StackCut` asks a controller at each pass whether to run the blocks. If not, each block
hands its inputs on untouched and the last one adds the residual that the controller gave.

diffusers' own caches cut at each block and need a registry of what every block class takes and returns; its
FirstBlockCache cannot run FLUX.2, whose two kinds of block differ. A cut at the stack needs none of that. The hooks are
diffusers' `ModelHook`s on the instances, so nothing is forked or patched on a class, `cache_context` reaches them as it
reaches any of its caches, and pipelines reset them after a call. One limit comes with them: a module with such hooks
cannot be deep-copied (the copy would run the blocks of the original), so trying to is an error here.
"""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from jaxtyping import Float
from torch import Tensor, nn

HOOK_NAME = "diffusion_opt_step_cache"


@dataclass(frozen=True, slots=True)
class StackInput:
    """One pass, seen where the stack begins."""

    context: str | None  # the name given to `transformer.cache_context`: "cond" or "uncond" in diffusers' pipelines
    step: tuple[int, int] | None  # (index, number of steps) where the caller told `cache_context`
    time: float  # in [0, 1], 1 is noise
    hidden: Float[Tensor, "b n d"]  # image tokens as they enter the stack
    num_text: int  # text tokens, which stand before the image tokens in the fused stream
    modulation: Float[Tensor, "..."]  # of block 0, from the time embedding
    block: nn.Module  # block 0

    def modulated(self) -> Float[Tensor, "b n d"]:
        """The image tokens as block 0's attention sees them: normalized, then scaled and shifted by the time."""
        shift, scale, _ = Flux2Modulation.split(self.modulation, 2)[0]
        return (1 + scale) * self.block.norm1(self.hidden) + shift


class Controller(Protocol):
    """Decides over each pass of the stack, and learns what was computed."""

    def begin(self, stack: StackInput) -> Float[Tensor, "b n d"] | None:
        """The residual to use instead of the blocks, or None to run them."""
        ...

    def computed(self, stack: StackInput, residual: Float[Tensor, "b n d"]) -> None:
        """The blocks ran and gave this residual."""
        ...

    def end_generation(self) -> None:
        """A pipeline call has ended."""
        ...


class StackCut:
    """The cut in one transformer: `attach` puts its hooks in place, `detach` takes every trace of them away.

    Raises ValueError, saying why, for a transformer that cannot be cut.
    """

    def __init__(self, transformer: nn.Module, controller: Controller) -> None:
        check_can_cut(transformer)
        self.controller = controller
        self.call: tuple[str | None, tuple[int, int] | None, float] | None = None  # None: a pass to leave alone
        self.stack: StackInput | None = None  # of the pass under way
        self.skipped: Tensor | None = None  # what replaces the blocks in the pass under way

    def attach(self, transformer: nn.Module) -> None:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        hooks = [_FirstBlockHook(self), *(_MiddleBlockHook(self) for _ in blocks[1:-1]), _LastBlockHook(self)]
        for module, hook in zip((transformer, *blocks), (_PassHook(self), *hooks), strict=True):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
        transformer._diffusers_hook.invalidate_child_registries_cache()

    def detach(self, transformer: nn.Module) -> None:
        for module in (*transformer.transformer_blocks, *transformer.single_transformer_blocks, transformer):
            registry = module._diffusers_hook
            registry.invalidate_child_registries_cache()
            registry.remove_hook(HOOK_NAME, recurse=False)
            if not registry.hooks:  # diffusers leaves the empty registry and a bound `forward` on the instance
                del module._diffusers_hook
                if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                    del module.forward

    def __deepcopy__(self, memo: dict) -> "StackCut":
        raise ValueError(
            "a transformer with a step cache cannot be deep-copied: diffusers' hooks would run the blocks of the "
            "original; remove the cache, copy, and apply it to the copy"
        )


def check_can_cut(transformer: object) -> None:
    """Raise ValueError, saying why, unless this transformer's stack can be cut and is free."""
    if not isinstance(transformer, Flux2Transformer2DModel):
        hint = " (apply a step cache before torch.compile)" if hasattr(transformer, "_orig_mod") else ""
        raise ValueError(f"step caches know Flux2Transformer2DModel so far, got {type(transformer).__name__}{hint}")
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    if not (double and single):
        raise ValueError(f"the stack must begin with a double and end with a single block, got {double} + {single}")
    if transformer.is_cache_enabled:
        raise ValueError("diffusers' own cache is enabled on this transformer: call transformer.disable_cache() first")
    if attached_cut(transformer) is not None:
        raise ValueError("a step cache is already on this transformer: remove it before you apply another")


def attached_cut(transformer: nn.Module) -> StackCut | None:
    """The cut that is on a transformer, if any."""
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(HOOK_NAME)
    return None if hook is None else hook.cut


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


class _ContextName(StateManager):
    """Takes what `cache_context` hands to every stateful hook; unlike its parent it is content with no context."""

    def __init__(self) -> None:
        super().__init__(state_cls=object)
        self.given: CacheContext | None = None

    def set_context(self, context: CacheContext | None) -> None:
        self.given = context

    @property
    def name(self) -> str | None:
        return None if self.given is None else self.given.name

    @property
    def step(self) -> tuple[int, int] | None:
        known = self.given is not None and None not in (self.given.step_index, self.given.num_inference_steps)
        return (self.given.step_index, self.given.num_inference_steps) if known else None


class _CutHook(ModelHook):
    def __init__(self, cut: StackCut) -> None:
        super().__init__()
        self.cut = cut


class _PassHook(_CutHook):
    """On the transformer: notes context and time before a pass, and tells the controller when a generation ends."""

    _is_stateful = True

    def __init__(self, cut: StackCut) -> None:
        super().__init__(cut)
        self.context = _ContextName()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        given = _arguments(module, args, kwargs)
        if given.get("kv_cache_mode") is not None:
            raise ValueError(f"a step cache does not go with kv_cache_mode={given['kv_cache_mode']!r}: remove one")
        times = given["timestep"].reshape(-1)
        # Training, and batches of mixed times, are none of a cache's business: the blocks run as ever.
        alone = torch.is_grad_enabled() or not bool((times == times[0]).all())
        if torch.is_grad_enabled() and not module.training:
            warnings.warn("gradients are on, so the step cache is off: sample under torch.no_grad()", stacklevel=2)
        self.cut.call = None if alone else (self.context.name, self.context.step, float(times[0]))
        self.cut.stack = self.cut.skipped = None
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.context.set_context(None)
        self.cut.controller.end_generation()
        return module


class _FirstBlockHook(_CutHook):
    """On block 0: asks the controller, and hands the inputs on if the stack is skipped."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cut.call is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        given = _arguments(module, args, kwargs)
        text, hidden = given["encoder_hidden_states"], given["hidden_states"]
        self.cut.stack = StackInput(*self.cut.call, hidden, text.shape[1], given["temb_mod_img"], module)
        self.cut.skipped = self.cut.controller.begin(self.cut.stack)
        return self.fn_ref.original_forward(*args, **kwargs) if self.cut.skipped is None else (text, hidden)


class _MiddleBlockHook(_CutHook):
    """On the blocks between: hands the inputs on if the stack is skipped."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        if self.cut.skipped is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        given = _arguments(module, args, kwargs)
        text = given["encoder_hidden_states"]  # single blocks get one fused stream, and None here
        return given["hidden_states"] if text is None else (text, given["hidden_states"])


class _LastBlockHook(_CutHook):
    """On the last block, after the streams were joined: supplies the residual, or reports the one computed."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        stack = self.cut.stack
        if self.cut.skipped is not None:
            fused = _arguments(module, args, kwargs)["hidden_states"]
            image = fused[:, stack.num_text :] + self.cut.skipped
            return torch.cat([fused[:, : stack.num_text], image], dim=1)
        fused = self.fn_ref.original_forward(*args, **kwargs)
        if stack is not None:
            self.cut.controller.computed(stack, fused[:, stack.num_text :] - stack.hidden)
        return fused
