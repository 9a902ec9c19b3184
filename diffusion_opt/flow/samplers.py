"""Three ways to walk from noise to data along a velocity.

A sampler solves dx/dt = v(x, t) from t = 1 to t = 0 on a grid of times. What matters is the error per evaluation:

    euler               order 1, one evaluation a step: x <- x + (r - t) v(x, t)
    heun                order 2, two evaluations per step: average of the velocities at both ends
    adams_bashforth2    order 2, one evaluation a step: extrapolates with the velocity of the step before

Adams-Bashforth with uneven steps (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, III.5), with
h the current step and h' the one before:  x <- x + h [ v + (h / 2h') (v - v') ].  Its first step is an Euler step.
It is the honest rival of every technique that skips evaluations: a good solver with fewer steps costs nothing.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.flow.velocity import Condition, VelocityModel

OnStep = Callable[[int, Float[Tensor, "b *s"], Float[Tensor, "b *s"]], None]


def _grid(times: Float[Tensor, " n"]) -> list[float]:
    grid = [float(t) for t in times]
    if len(grid) < 2 or not all(1 >= t > r >= 0 for t, r in pairwise(grid)):
        raise ValueError(f"times must fall from noise (1) to data (0) in at least one step, got {grid}")
    return grid


def _at(model: VelocityModel, x: Tensor, t: float, condition: Condition | None) -> Tensor:
    return model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), condition)


def euler(
    model: VelocityModel,
    x: Float[Tensor, "b *s"],
    times: Float[Tensor, " n"],
    condition: Condition | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Float[Tensor, "b *s"]:
    """Euler's method over falling `times`; n - 1 evaluations. `on_step(i, x, v)` sees each state before it moves.

    Raises ValueError if the times do not fall.
    """
    grid = _grid(times)
    for i, (t, r) in enumerate(tqdm(list(pairwise(grid)), desc="euler", disable=not progress)):
        v = _at(model, x, t, condition)
        if on_step is not None:
            on_step(i, x, v)
        x = x + (r - t) * v
    return x


def heun(
    model: VelocityModel,
    x: Float[Tensor, "b *s"],
    times: Float[Tensor, " n"],
    condition: Condition | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Float[Tensor, "b *s"]:
    """Heun's method over falling `times`; 2 (n - 1) evaluations. Arguments and errors as in `euler`."""
    grid = _grid(times)
    for i, (t, r) in enumerate(tqdm(list(pairwise(grid)), desc="heun", disable=not progress)):
        v = _at(model, x, t, condition)
        if on_step is not None:
            on_step(i, x, v)
        v_end = _at(model, x + (r - t) * v, r, condition)
        x = x + (r - t) * (v + v_end) / 2
    return x


def adams_bashforth2(
    model: VelocityModel,
    x: Float[Tensor, "b *s"],
    times: Float[Tensor, " n"],
    condition: Condition | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Float[Tensor, "b *s"]:
    """Two-step Adams-Bashforth over falling `times`; n - 1 evaluations. Arguments and errors as in `euler`."""
    grid = _grid(times)
    previous: tuple[Tensor, float] | None = None
    for i, (t, r) in enumerate(tqdm(list(pairwise(grid)), desc="adams-bashforth", disable=not progress)):
        v = _at(model, x, t, condition)
        if on_step is not None:
            on_step(i, x, v)
        h = r - t
        slope = v if previous is None else v + h / (2 * previous[1]) * (v - previous[0])
        x = x + h * slope
        previous = (v, h)
    return x


SAMPLERS = {"euler": euler, "heun": heun, "adams_bashforth2": adams_bashforth2}
