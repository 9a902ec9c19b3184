"""Train or fine-tune a teacher: plain conditional flow matching with classifier-free guidance dropout.

    loss = E | v(x_t, t, c) - (e - x) |^2,   x_t = (1 - t) x + t e,   t logit-normal

(Lipman et al. 2023, arXiv 2210.02747, equation 9, with the time distribution of Esser et al. 2024, arXiv 2403.03206.)
The condition is dropped for one sample in ten, so that the same network also learns the unconditional velocity that
guidance needs (Ho & Salimans 2022, arXiv 2207.12598).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_opt.flow import interpolate, logit_normal_times, randn, velocity_target
from diffusion_opt.subjects import Samples
from diffusion_opt.training import Role


@dataclass(frozen=True, slots=True)
class FlowMatchingSettings:
    """What may be changed of it. Raises ValueError for a share outside [0, 1)."""

    drop_condition: float = 0.1  # share of samples trained without their condition

    def __post_init__(self) -> None:
        if not 0 <= self.drop_condition < 1:
            raise ValueError(f"drop_condition must lie in [0, 1), got {self.drop_condition}")


@dataclass
class FlowMatching:
    """A `Distiller` that fits `model` (a `VelocityModel`) to samples on the model's device, with their conditions."""

    model: nn.Module
    data: Samples
    drop_condition: float = 0.1  # share of samples trained without their class
    shift: float = 1.0  # of the times; above 1 trains nearer to noise (Esser et al. 2024, section 5.3.2)

    @property
    def roles(self) -> dict[str, Role]:
        return {"teacher": Role(self.model)}

    def turn(self, step: int) -> str:
        return "teacher"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "teacher") -> dict[str, Tensor]:
        """Mean squared velocity error of one random batch."""
        device = generator.device
        x, condition = self.data.draw(batch_size, generator)
        condition = condition.drop(torch.rand(batch_size, generator=generator, device=device) < self.drop_condition)
        t = logit_normal_times(batch_size, generator, shift=self.shift)
        noise = randn(tuple(x.shape), generator)
        velocity = self.model(interpolate(x, noise, t), t, condition)
        return {"loss": (velocity - velocity_target(x, noise)).square().mean()}
