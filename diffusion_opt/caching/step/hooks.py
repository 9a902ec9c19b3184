"""Hooks on one transformer, and the names of its passes.

The caches are diffusers' `ModelHook`s on instances; `remove_hook` leaves no trace of one.

A step of guided sampling is one, two or more passes of the transformer, and a cache must keep them apart: a residual of
the prompt's pass is worth nothing in the unconditional one. diffusers' pipelines name their passes,

    with transformer.cache_context("cond", step_index=3, num_inference_steps=50): ...

but SD3's transformer has no such method, and custom loops often forget it. Passes without a name are told apart by the
order of their calls: a second call at the same time with the same latent is the guidance pass of the same step (Heun's
second call at one time comes with another latent). Names belong to the thread that gave them.
"""

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager, _set_cache_context
from jaxtyping import Float
from torch import Tensor, nn

NO_COPY = (
    "a transformer with a cache cannot be deep-copied: diffusers' hooks would run the blocks of the original; "
    "remove the cache, copy, and apply it to the copy"
)


@contextmanager
def cache_context(
    transformer: nn.Module, name: str, step_index: int | None = None, num_inference_steps: int | None = None
) -> Iterator[None]:
    """Name the passes of a custom loop, as `transformer.cache_context` does on classes that have it; SD3 has not."""
    _set_cache_context(transformer, CacheContext(name, step_index=step_index, num_inference_steps=num_inference_steps))
    try:
        yield
    finally:
        _set_cache_context(transformer, None)


class _Given(threading.local):
    """What one thread said, and the last unnamed call it made."""

    def __init__(self) -> None:
        self.context: CacheContext | None = None
        self.time: float | None = None
        self.sample: Tensor | None = None
        self.order = 0


class PassNames(StateManager):
    """Takes what `cache_context` hands to every stateful hook; unlike its parent it is content with no context."""

    def __init__(self) -> None:
        super().__init__(state_cls=object)
        self._given = _Given()

    def set_context(self, context: CacheContext | None) -> None:
        self._given.context = context

    def forget(self) -> None:
        """A generation has ended."""
        self._given.context = self._given.time = self._given.sample = None

    def identify(self, time: float | None, sample: Float[Tensor, "b *s"]) -> dict[str, Any]:
        """Context, step, time and sample of a call: the first fields of a `StackPass`.

        The noise level that a caller told is preferred to the timestep, which some schedulers round. With the time
        None unnamed calls are told apart without a look at values: the same tensor again is the same step.
        """
        given = self._given.context
        if given is None:
            return {"context": self._by_order(time, sample), "step": None, "time": time, "sample": sample}
        self._given.time = self._given.sample = None
        known = None not in (given.step_index, given.num_inference_steps)
        return {
            "context": given.name,
            "step": (given.step_index, given.num_inference_steps) if known else None,
            "time": given.sigma if given.sigma is not None and 0 <= given.sigma <= 1 else time,
            "sample": sample,
        }

    def _by_order(self, time: float | None, sample: Tensor) -> str | None:
        last = self._given
        again = last.sample is sample if time is None else last.time == time and _same(last.sample, sample)
        last.order = last.order + 1 if again else 0
        last.time, last.sample = time, sample
        return f"pass {last.order + 1}" if last.order else None


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is other or (one is not None and one.shape == other.shape and bool(torch.equal(one, other)))


class InstanceHook(ModelHook):
    """A hook that stays with the module it was put on, and knows the `forward` that it made there."""

    installed: Any = None

    def __deepcopy__(self, memo: dict) -> "InstanceHook":
        raise ValueError(NO_COPY)


def hook_on(module: object, name: str) -> ModelHook | None:
    """The hook of this name on a module, if any."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def put_hook(module: nn.Module, hook: InstanceHook, name: str) -> None:
    """Register a hook, beneath accelerate's if the module has one.

    accelerate's offloading takes its own `forward` off and puts a new one on after every generation of a pipeline, and
    what was put over it in between would be lost.
    """
    offloaded = "_old_forward" in module.__dict__ and "forward" in module.__dict__
    above = module.__dict__.get("forward")
    if offloaded:
        module.forward = module._old_forward
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    hook.installed = module.forward
    if offloaded:
        module._old_forward, module.forward = module.forward, above


def check_removable(module: nn.Module, name: str) -> None:
    """Raise ValueError if something that is no hook was put over this one, so that it cannot be taken out."""
    _holder(module, hook_on(module, name))


def remove_hook(module: nn.Module, name: str) -> None:
    """Take a hook off a module, and what diffusers leaves behind: an empty registry and a bound `forward`.

    Hooks above and beneath stay as they are. (diffusers' own removal cuts out a hook above that replaces `forward`.)
    Raises ValueError as `check_removable` does.
    """
    registry, hook = module._diffusers_hook, module._diffusers_hook.hooks[name]
    beneath = hook.fn_ref.forward if hook.fn_ref.original_forward is None else hook.fn_ref.original_forward
    holder, attribute = _holder(module, hook)
    setattr(holder, attribute, beneath)
    index = registry._hook_order.index(name)
    del registry.hooks[name], registry._hook_order[index], registry._fn_refs[index]
    registry.invalidate_child_registries_cache()
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def _holder(module: nn.Module, hook: ModelHook) -> tuple[Any, str]:
    """Who calls what a hook made of `forward`: the module, accelerate beneath its own, or another hook."""
    installed = getattr(hook, "installed", None) or module.forward
    for attribute in ("forward", "_old_forward"):
        if module.__dict__.get(attribute) is installed:
            return module, attribute
    for above in module._diffusers_hook._fn_refs:
        for attribute in ("original_forward", "forward"):
            if getattr(above, attribute) is installed:
                return above, attribute
    raise ValueError(
        f"something was put over the cache's forward of this {type(module).__name__} since the cache was applied "
        f"({module.forward!r}): take that off first"
    )


@functools.cache
def _signature(module_class: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(module_class.forward)


def parameter_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module's `forward`, in order."""
    return tuple(_signature(module_class).parameters)[1:]


@torch.compiler.disable
def arguments_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by name."""
    given = _signature(type(module)).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in given.items() if name != "self"}
