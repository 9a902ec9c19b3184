"""Distribution matching distillation: a one-step student whose pictures are distributed as the teacher's.

The student turns noise into a picture x in one pass. Let x_t be x with fresh noise. Two velocities are known at x_t:
the (guided) teacher's v_T and that of a "fake score" v_phi, a network kept trained on the student's own pictures. Their
difference is the difference of two scores, and so the gradient of KL(student || teacher) at noise level t
(Yin et al. 2023, arXiv 2311.18828, equation 7):

    gradient of x  =  w (x_phi - x_T) = w t (v_T - v_phi),      x_T = x_t - t v_T,  w = 1 / mean|x - x_T|

It moves pictures from where the student has too many to where the teacher has more. As in DMD2 (Yin et al. 2024,
arXiv 2405.14867) there is no regression term; the fake score gets K - 1 updates for each of the student's, since a
stale fake score is what lets modes drop. It starts as the teacher and is warmed up on the student before the student
moves: with all three networks equal the gradient is exactly zero.

The loss functions equal those of `modelopt.torch.fastgen` number for number (tests); there the caller writes the loop.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import (
    ClassCondition,
    VelocityModel,
    clean_from_velocity,
    interpolate,
    randn,
    velocity_target,
)
from diffusion_opt.training import Role


def dmd_gradient(
    x: Float[Tensor, "b *s"], teacher_x: Float[Tensor, "b *s"], fake_x: Float[Tensor, "b *s"]
) -> Float[Tensor, "b *s"]:
    """w (x_phi - x_T) with w = 1 / mean|x - x_T| of each item; `teacher_x`, `fake_x` are clean predictions at x_t."""
    distance = (x - teacher_x).abs().flatten(1).mean(1).clamp(min=1e-6)
    return (fake_x - teacher_x) / distance.reshape(-1, *[1] * (x.ndim - 1))


def dmd_loss(
    x: Float[Tensor, "b *s"], teacher_x: Float[Tensor, "b *s"], fake_x: Float[Tensor, "b *s"]
) -> Float[Tensor, ""]:
    """A loss whose gradient in x is `dmd_gradient` over the number of elements (arXiv 2311.18828, eq. 8)."""
    with torch.no_grad():
        target = x - dmd_gradient(x, teacher_x, fake_x)
    return 0.5 * (x - target).square().mean()


def fake_score_loss(
    velocity: Float[Tensor, "b *s"], x: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"]
) -> Float[Tensor, ""]:
    """Flow matching on the student's pictures: mean |v_phi - (e - x)|^2."""
    return (velocity - velocity_target(x, noise)).square().mean()


@dataclass
class DistributionMatching:
    """A `Distiller`: `student` and `fake_score` are trained, `teacher` (guided) is not.

    `student(noise, 1, condition)` must already be near a picture: start from a trajectory student.
    """

    student: nn.Module
    fake_score: nn.Module
    teacher: VelocityModel
    image_shape: tuple[int, ...]
    num_classes: int
    fake_updates: int = 4  # of the fake score between two of the student (K - 1)
    warmup: int = 50  # updates of the fake score before the first of the student
    fake_rate: float = 2.0  # learning rate of the fake score over the student's
    t_min: float = 0.02
    t_max: float = 0.98

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student), "fake_score": Role(self.fake_score, self.fake_rate)}

    def turn(self, step: int) -> str:
        since = step - self.warmup
        return "student" if since >= 0 and since % (self.fake_updates + 1) == 0 else "fake_score"

    def generate(self, generator: torch.Generator, batch_size: int) -> tuple[Float[Tensor, "b *s"], ClassCondition]:
        """Pictures of the student, random classes."""
        device = generator.device
        labels = torch.randint(self.num_classes, (batch_size,), generator=generator, device=device)
        condition = ClassCondition(labels, self.num_classes)
        noise, ones = randn((batch_size, *self.image_shape), generator), torch.ones(batch_size, device=device)
        return clean_from_velocity(noise, self.student(noise, ones, condition), ones), condition

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        """The loss of the turn; on the student's also `lag` = |x_phi - x_T| / |x - x_T|, small when both agree."""
        with torch.set_grad_enabled(turn == "student"):
            x, condition = self.generate(generator, batch_size)
        t = torch.rand(batch_size, generator=generator, device=generator.device)
        t = self.t_min + (self.t_max - self.t_min) * t
        noise = randn(tuple(x.shape), generator)
        x_t = interpolate(x, noise, t)
        if turn == "fake_score":
            return {"loss": fake_score_loss(self.fake_score(x_t, t, condition), x, noise)}
        with torch.no_grad():
            teacher_x = clean_from_velocity(x_t, self.teacher(x_t, t, condition), t)
            fake_x = clean_from_velocity(x_t, self.fake_score(x_t, t, condition), t)
            lag = (fake_x - teacher_x).abs().mean() / (x - teacher_x).abs().mean()
        return {"loss": dmd_loss(x, teacher_x, fake_x), "lag": lag}
