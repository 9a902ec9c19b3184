"""Train a teacher: plain conditional flow matching with classifier-free guidance dropout.

    loss = E | v(x_t, t, c) - (e - x) |^2,   x_t = (1 - t) x + t e,   t logit-normal

(Lipman et al. 2023, arXiv 2210.02747, equation 9, with the time distribution of Esser et al. 2024, arXiv 2403.03206.)
The condition is dropped for one sample in ten, so that the same network also learns the unconditional velocity that
guidance needs (Ho & Salimans 2022, arXiv 2207.12598).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_opt.datasets import ImageData
from diffusion_opt.flow import ClassCondition, interpolate, logit_normal_times, randn, velocity_target
from diffusion_opt.training import Role


@dataclass
class FlowMatching:
    """A `Distiller` that fits `model` (a `VelocityModel`) to labeled images held on the model's device."""

    model: nn.Module
    data: ImageData
    drop_condition: float = 0.1  # share of samples trained without their class

    @property
    def roles(self) -> dict[str, Role]:
        return {"teacher": Role(self.model)}

    def turn(self, step: int) -> str:
        return "teacher"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "teacher") -> dict[str, Tensor]:
        """Mean squared velocity error of one random batch."""
        device = generator.device
        index = torch.randint(len(self.data), (batch_size,), generator=generator, device=device)
        x, labels = self.data.images[index], self.data.labels[index]
        condition = ClassCondition(labels, len(self.data.class_names))
        condition = condition.drop(torch.rand(batch_size, generator=generator, device=device) < self.drop_condition)
        t = logit_normal_times(batch_size, generator)
        noise = randn(tuple(x.shape), generator)
        velocity = self.model(interpolate(x, noise, t), t, condition)
        return {"loss": (velocity - velocity_target(x, noise)).square().mean()}
