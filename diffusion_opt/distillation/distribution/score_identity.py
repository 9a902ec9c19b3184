"""Score identity distillation (SiD): the Fisher divergence of student and teacher, descended through both networks.

Distribution matching uses the difference of two scores as a gradient and stops there. SiD (Zhou et al. 2024, arXiv
2404.04057) minimizes its square, E|x_T - x_phi|^2, over the student's own pictures. Two estimators of it have the same
value where the fake score is exact, since E[x | x_t] = x_phi then:

    L1 = |x_T - x_phi|^2,      L2 = (x_T - x_phi) . (x_T - x),      loss = w (L2 - alpha L1),   w = 1 / mean|x - x_T|

Neither sees how the fake score moves with the student, because it is held while the student learns. The gradient of L2
misses half of that term and L1 all of it, so alpha = 1/2 gives exactly half the gradient of the true divergence (a
test; Luo et al. 2024, arXiv 2410.16794, arrive there from the other side). Larger alpha works better in practice, 1.0
to 1.2 in the paper; it is bolder and less stable. Gradients run through teacher and fake score to x_t, which is what
this costs over distribution matching. The teacher's weights must not ask for gradients (`requires_grad_(False)`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.distillation.distribution.adversarial import frozen, generator_loss
from diffusion_opt.distillation.distribution.alarms import observed
from diffusion_opt.distillation.distribution.dmd import DistributionMatching, mean_distance
from diffusion_opt.distillation.distribution.rollout import Noised
from diffusion_opt.flow import clean_from_velocity, expand_time


def score_identity_loss(
    x: Float[Tensor, "b *s"],
    teacher_x: Float[Tensor, "b *s"],
    fake_x: Float[Tensor, "b *s"],
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """mean of w (x_T - x_phi) . [(x_T - x) - alpha (x_T - x_phi)] (arXiv 2404.04057, eq. 23), w without gradient.

    All three carry gradients: x, and both clean predictions at x_t through x_t.
    """
    gap = teacher_x - fake_x
    weight = 1 / expand_time(mean_distance(x, teacher_x).detach(), x)
    return (weight * gap * ((teacher_x - x) - alpha * gap)).mean()


@dataclass(kw_only=True)
class ScoreIdentity(DistributionMatching):
    """A `Distiller` as `DistributionMatching`, with SiD's loss for the student; it takes no other divergence.

    With a GAN head it is SiDA (Zhou et al. 2024, arXiv 2410.14919): the head sees real pictures, so the student may
    become better than its teacher.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "reverse_kl":
            raise ValueError(f"score identity distillation has a divergence of its own, got {self.divergence!r}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")

    def student_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """SiD's loss, which may be negative, with a head also `gan`, and what the alarms read."""
        with frozen(self.fake_score, *([] if self.head is None else [self.head])):
            teacher_x = batch.clean(self.teacher)
            velocity, logits = self.judge(batch.x_t, batch.t, batch.condition)
            fake_x = clean_from_velocity(batch.x_t, velocity, batch.t)
        losses = {"loss": score_identity_loss(batch.x, teacher_x, fake_x, self.alpha)}
        if logits is not None:
            losses |= {"identity": losses["loss"].detach(), "gan": generator_loss(logits)}
            losses["loss"] = losses["loss"] + self.gan.student_weight * losses["gan"]
        seen = observed(batch.x.detach(), teacher_x.detach(), fake_x.detach(), self.reference, generator)
        return losses | seen
