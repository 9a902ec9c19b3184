"""How a pipeline makes one velocity of the passes of a step, read off what it hands to its scheduler.

A step of guided sampling is one, two or more passes, and each pipeline has its own formula: u + w (c - u) of two passes
or of the halves of one, LTX-2's sum of three guidances in the space of clean images, rescaled ones. All are sums of
what the passes gave, with weights that are the same for every number of a step:

    v = sum_k  a_k v_k        a = argmin |v - sum_k a_k v_k|^2,  v as `scheduler.step` received it

So no formula is repeated here, and a pipeline that nobody has seen is served. Rescaling makes the weights depend a
little on the sample; least squares then gives the nearest constants. Where what the scheduler gets is not of the shape
that the passes have (one that decodes or drops tokens in between), the pass with the prompt stands for the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

Weights = dict[str, float]  # of each pass or half of a pass, by name
UNCONDITIONAL = " without prompt"  # behind the name of a context: the first half of a doubled batch


def halves(velocities: Mapping[str, Float[Tensor, "_ *s"]], batch: int) -> dict[str, Float[Tensor, "b *s"]]:
    """What each pass gave, a doubled batch as its two halves, unconditional first as in diffusers."""
    found: dict[str, Tensor] = {}
    for name, velocity in velocities.items():
        if len(velocity) == 2 * batch:
            found[name + UNCONDITIONAL], found[name] = velocity.chunk(2)
        else:
            found[name] = velocity
    return found


def weights_of(parts: Mapping[str, Float[Tensor, "b *s"]], moving: Tensor | None) -> Weights:
    """The weights with which the parts make the velocity that the scheduler received; None: it is not known."""
    fits = moving is not None and all(part.shape == moving.shape for part in parts.values())
    if not fits:
        return {name: float(name == _prompted(parts)) for name in parts}
    columns = torch.stack([part.detach().double().cpu().flatten() for part in parts.values()], dim=1)
    target = moving.detach().double().cpu().flatten()[:, None]
    solution = torch.linalg.lstsq(columns, target, driver="gelsd").solution[:, 0]
    return dict(zip(parts, solution.tolist(), strict=True))


def _prompted(parts: Mapping[str, Any]) -> str:
    """The part with the prompt: the first that is not called otherwise."""
    return next(name for name in parts if not name.startswith("uncond") and not name.endswith(UNCONDITIONAL))


def combined(weights: Weights, parts: Mapping[str, Float[Tensor, "b *s"]]) -> Float[Tensor, "b *s"]:
    """The sum of the parts with these weights."""
    return sum(weights[name] * part for name, part in parts.items() if weights[name])


@contextmanager
def heard(scheduler: SchedulerMixin) -> Iterator[Sequence[Tensor]]:
    """During this block the velocities that a scheduler is asked to step along are kept, in order.

    LTX-2 steps its audio with a copy of the scheduler, which keeps its own.
    """
    own = type(scheduler)

    class Hearing(own):
        _heard: Any = ()

        @wraps(own.step)
        def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._heard.append(model_output)
            return super().step(model_output, *args, **kwargs)

    Hearing.__name__, Hearing.__qualname__ = own.__name__, own.__qualname__
    scheduler._heard = found = []
    scheduler.__class__ = Hearing
    try:
        yield found
    finally:
        scheduler.__class__ = own
        del scheduler._heard
