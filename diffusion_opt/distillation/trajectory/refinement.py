"""Pictures of a one-step student, finished by one pass of its teacher: takes off the grain of distribution matching.

A student of one step that was trained by matching distributions makes pictures of the right kinds, with a grain that
its teacher never makes, because scores are compared at noise levels at which the grain is drowned. The teacher can take
it off: noise the student's picture S(z) a little, with the noise z that it was made from, and let the teacher jump from
there to the end,

    x_tau = (1 - tau) S(z) + tau z,        target = x_tau - tau v_T(x_tau, tau)

(SDEdit, Meng et al. 2022, arXiv 2108.01073, in one step and from the student's own noise). Nothing is drawn at random,
so the target is a function of z, and one close to S(z): a regression on it does not blur as one on stored paths does,
whose ends a single pass cannot tell apart. Two students come out of it:

    2 steps, at the times 1 and tau     the first jump stays as it was, since (z - x_tau) / (1 - tau) is the velocity of
                                        S(z); what is learned is to be the teacher at tau
    1 step                              jumps from z to the target

Every batch has fresh noise; nothing is stored. The loss is the pseudo-Huber distance of `metrics.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_opt.distillation.trajectory.metrics import pseudo_huber
from diffusion_opt.flow import VelocityModel, expand_time, randn
from diffusion_opt.subjects import Conditions
from diffusion_opt.training import Role

TAU = 0.2  # time at which the teacher takes over


@dataclass(frozen=True, slots=True)
class RefinementSettings:
    """What a run may change. Raises ValueError for a share outside (0, 1]."""

    share: float = 0.75  # of a batch that trains the second jump of a student of two steps

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")


@dataclass
class Refinement:
    """A `Distiller`: `student` begins as the one-step student `start`, whose pictures the `teacher` finishes.

    `times` are those of the student: (1,) or (1, tau). Raises ValueError for others.
    """

    student: nn.Module
    start: nn.Module
    teacher: VelocityModel
    conditions: Conditions
    sample_shape: tuple[int, ...]
    times: tuple[float, ...]
    settings: RefinementSettings = RefinementSettings()
    tau: float = TAU

    def __post_init__(self) -> None:
        if self.times not in ((1.0,), (1.0, self.tau)):
            raise ValueError(f"a refined student has the times (1,) or (1, {self.tau:g}), got {self.times}")

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """Pseudo-Huber distance between the student's jump and the one that it should make, over fresh noise."""
        noise = randn((batch_size, *self.sample_shape), generator)
        condition = self.conditions.draw(batch_size, generator)
        ones = noise.new_ones(batch_size)
        with torch.no_grad():
            near = noise - (1 - self.tau) * self.start(noise, ones, condition)
            end = near - self.tau * self.teacher(near, self.tau * ones, condition)
        if len(self.times) == 1:
            x_t, x_r, t, r = noise, end, ones, torch.zeros_like(ones)
        else:
            second = torch.rand(batch_size, generator=generator, device=noise.device) < self.settings.share
            of_second = second.reshape(-1, *(1 for _ in self.sample_shape))
            x_t, x_r = torch.where(of_second, near, noise), torch.where(of_second, end, near)
            t, r = torch.where(second, self.tau, 1.0), torch.where(second, 0.0, self.tau)
        jump = x_t - expand_time(t - r, x_t) * self.student(x_t, t, condition)
        return {"loss": pseudo_huber(jump - x_r).mean(), "squared_error": (jump - x_r).detach().square().mean()}
