"""Knowledge distillation along the teacher's ODE: the student jumps from rung to rung of the teacher's path.

With the teacher's states x_{t_0} (noise), …, x_{t_n} (picture) the student's velocity u is fitted to the mean velocity
of each jump, guidance included, so that one pass does what many guided teacher steps did:

    loss = d( x_{t_k} - (t_k - t_{k+1}) u(x_{t_k}, t_k, c),  x_{t_{k+1}} )

For one rung this is Luhman & Luhman 2021 (arXiv 2101.02388); for several, ODE regression as CausVid initializes its
student (Yin et al. 2024, arXiv 2412.07772). d is the pseudo-Huber distance of `metrics.py`: less blur than squared
error, because one hard sample weighs less.

The student keeps the teacher's network and is sampled by the plain Euler scheduler with n steps: nothing at inference
tells it from an ordinary pipeline.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_opt.distillation.trajectory.metrics import pseudo_huber
from diffusion_opt.distillation.trajectory.pairs import OdePairs
from diffusion_opt.flow import expand_time
from diffusion_opt.training import Role


@dataclass
class OdeDistillation:
    """A `Distiller` that fits `model`, usually a copy of the teacher, to stored trajectories.

    `steps` is the number of jumps the student makes; it must divide the rungs of the store.
    """

    model: nn.Module
    pairs: OdePairs
    steps: int

    def __post_init__(self) -> None:
        rungs = len(self.pairs.times) - 1
        if self.steps < 1 or rungs % self.steps:
            raise ValueError(f"steps must divide the {rungs} rungs of the stored trajectories, got {self.steps}")

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.model)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """Pseudo-Huber distance between the student's jump and the teacher's, over random samples and jumps."""
        pairs, device = self.pairs, generator.device
        stride = (len(pairs.times) - 1) // self.steps
        index = torch.randint(len(pairs), (batch_size,), generator=generator, device=device)
        rung = stride * torch.randint(self.steps, (batch_size,), generator=generator, device=device)
        x_t, x_r = pairs.states[index, rung], pairs.states[index, rung + stride]
        t, r = pairs.times[rung], pairs.times[rung + stride]
        velocity = self.model(x_t, t, pairs.conditions[pairs.labels[index]])
        jump = x_t - expand_time(t - r, x_t) * velocity
        return {"loss": pseudo_huber(jump - x_r).mean(), "squared_error": (jump - x_r).detach().square().mean()}
