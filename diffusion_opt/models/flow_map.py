"""The guidance slot of a stock FLUX.2 transformer: how far a pass is to jump, or how strongly it is guided.

A flow map u(x_t, t, r) needs a second time. FLUX.2's class has a place for it: with `guidance_embeds` a scalar g goes
through the same sinusoids as t (both times 1000) and a small network of its own, and is added to the time embedding.
A student that has its guidance distilled in needs no guidance scale, so here

    g = t - r          the length of the jump; 0 asks for the velocity at t itself

The network of g starts with an output of zero: the student begins as exactly its teacher. Nothing is forked, the saved
weights open in diffusers' own class, and the loop of diffusers' pipeline stays as it is: `scheduled_jumps` fills the
slot from the scheduler's times during a call (AnyFlow, arXiv 2605.13724, adds an embedding of t - r in the same way).

A student that knows one time may use the slot as FLUX.2 [dev] does, for the guidance scale w that is distilled into it
(Meng et al. 2022, arXiv 2210.03142): `fixed_guidance` puts w there, and one pass does the work of two.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, Flux2Transformer2DModel, SchedulerMixin
from torch import Tensor, nn


def flow_map_transformer(teacher: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    """A copy of a transformer with a guidance slot (for the length of a jump, or a scale); the same output at first.

    Raises ValueError if the slot is taken: the transformer embeds a guidance scale already.
    """
    if teacher.config.guidance_embeds:
        raise ValueError("this transformer embeds a guidance scale; the slot for the second time is taken")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the only fresh weights, those of the slot, are the same each time
        student = Flux2Transformer2DModel.from_config({**teacher.config, "guidance_embeds": True})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    slot = [name for name in missing if not name.startswith("time_guidance_embed.guidance_embedder.")]
    if slot or unexpected:
        raise ValueError(f"the weights do not fit: missing {slot}, unexpected {unexpected}")
    embedder = student.time_guidance_embed.guidance_embedder
    embedder.linear_1.load_state_dict(student.time_guidance_embed.timestep_embedder.linear_1.state_dict())
    nn.init.zeros_(embedder.linear_2.weight)
    weight = next(teacher.parameters())
    nn.Module.to(student, weight.device, weight.dtype)  # diffusers' own `to` has a word to say at each call
    return student.train(teacher.training)


@contextmanager
def scheduled_jumps(transformer: nn.Module, scheduler: SchedulerMixin) -> Iterator[None]:
    """During this block each pass of the transformer jumps from its time to the scheduler's next one.

    A scheduler that noises predictions again asks for the picture, so there each pass jumps to 0. Raises ValueError at
    a pass whose time the schedule does not have.
    """

    renoises = isinstance(scheduler, FlowMatchLCMScheduler)
    with _filled_slot(transformer, lambda time: time if renoises else time - _next_time(scheduler, time)):
        yield


@contextmanager
def fixed_guidance(transformer: nn.Module, scale: float) -> Iterator[None]:
    """During this block each pass of the transformer finds the guidance scale in its slot."""
    with _filled_slot(transformer, lambda time: torch.full_like(time, scale)):
        yield


@contextmanager
def _filled_slot(transformer: nn.Module, value: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """During this block a pass that brings no `guidance` gets value(its times (B,))."""

    def fill(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("guidance") is None:
            kwargs["guidance"] = value(kwargs["timestep"])
        return args, kwargs

    handle = transformer.register_forward_pre_hook(fill, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _next_time(scheduler: SchedulerMixin, time: Tensor) -> Tensor:
    """The time after `time` (B,) in the schedule, both in [0, 1]."""
    sigmas = scheduler.sigmas.to(time.device, torch.float64)
    distance = (sigmas[:-1] - time[:1].double()).abs()
    index = int(distance.argmin())
    if distance[index] > 1e-3:
        raise ValueError(f"time {float(time[0]):g} is not in the schedule {[round(s, 4) for s in sigmas.tolist()]}")
    return sigmas[index + 1].to(time.dtype).expand_as(time)
