"""Reflow: train the student on straight lines between the teacher's noise and the picture it made of it.

Flow matching joins data and noise at random, so lines cross and the learned path bends where they do. Pairs (e, x_T(e))
made by solving the teacher's path never cross; on the lines between their ends,

    x_t = (1 - t) x_T(e) + t e,      loss = d( u(x_t, t, c),  e - x_T(e) ),

the best velocity is nearly constant along each line: the new path is straight, and one Euler step nearly exact (Liu et
al. 2023, arXiv 2209.03003, section 2.2; one round is enough and d a Huber distance, Lee et al. 2024, arXiv 2405.20320).
The latter also trains where it is hard, at both ends of time: density of t proportional to exp(a t) + exp(-a t), a = 4.

Beside knowledge distillation on the same pairs (`ode_distillation.py`), which trains single jumps and serves their
number of steps only, a reflowed student is a velocity field: any solver, any number of steps, Euler at one.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.trajectory.metrics import pseudo_huber
from diffusion_opt.distillation.trajectory.pairs import OdePairs
from diffusion_opt.flow import interpolate, velocity_target
from diffusion_opt.training import Role


def u_shaped_times(num: int, generator: torch.Generator, a: float = 4.0) -> Float[Tensor, " num"]:
    """Draw `num` times in [0, 1] with density proportional to exp(a t) + exp(-a t), by inverting its two halves.

    Raises ValueError unless a > 0.
    """
    if a <= 0:
        raise ValueError(f"a must be positive (4 in the paper), got {a}")
    u, side = torch.rand(2, num, generator=generator, device=generator.device)
    late = (torch.log1p(u * math.expm1(a)) / a).clamp(0, 1)
    return torch.where(side < 0.5, late, 1 - late)


def reflow_loss(
    velocity: Float[Tensor, "b *s"], x: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"]
) -> Float[Tensor, ""]:
    """Pseudo-Huber distance of the velocity on the line from `noise` to `x` to that line's own, e - x."""
    return pseudo_huber(velocity - velocity_target(x, noise)).mean()


@dataclass
class Reflow:
    """A `Distiller` that straightens `student`, usually a copy of the teacher, on stored pairs; it needs no data."""

    student: nn.Module
    pairs: OdePairs

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """`reflow_loss` over random pairs and U-shaped times."""
        pairs = self.pairs
        index = torch.randint(len(pairs), (batch_size,), generator=generator, device=generator.device)
        noise, x = pairs.states[index, 0], pairs.states[index, -1]
        t = u_shaped_times(batch_size, generator)
        condition = pairs.conditions[pairs.labels[index]]
        velocity = self.student(interpolate(x, noise, t), t, condition)
        squared_error = (velocity.detach() - velocity_target(x, noise)).square().mean()
        return {"loss": reflow_loss(velocity, x, noise), "squared_error": squared_error}
