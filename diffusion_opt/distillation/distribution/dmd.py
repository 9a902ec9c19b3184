"""Distribution matching distillation: a student whose pictures are distributed as the teacher's.

The student turns noise into a picture x in one pass or a few. Let x_t be x with fresh noise. Two velocities are known
at x_t: the (guided) teacher's v_T and that of a "fake score" v_phi, a network kept trained on the student's own
pictures. Their difference is the difference of two scores, and so the gradient of KL(student || teacher) at noise
level t (Yin et al. 2023, arXiv 2311.18828, equation 7):

    gradient of x  =  w (x_phi - x_T) = w t (v_T - v_phi),      x_T = x_t - t v_T,  w = 1 / mean|x - x_T|

It moves pictures from where the student has too many to where the teacher has more. As in DMD2 (Yin et al. 2024,
arXiv 2405.14867) there is no regression term; the fake score gets K - 1 updates for each of the student's and a higher
learning rate (two time scales), since a stale fake score is what lets modes drop. It starts as the teacher and is
warmed up on the student before the student moves: with all three networks equal the gradient is exactly zero.

Options: a ladder of times for students of several steps (`rollout.py`); a GAN head on the features of the fake score,
which sees real pictures (`adversarial.py`); another divergence, which needs that head (`f_divergence.py`).

The loss functions equal those of `modelopt.torch.fastgen` to 1e-6 (tests); there the caller writes the loop.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.distribution.adversarial import (
    FeatureHeads,
    GanSettings,
    captured,
    critic_terms,
    frozen,
    generator_loss,
)
from diffusion_opt.distillation.distribution.alarms import Alarms, observed, smoothed
from diffusion_opt.distillation.distribution.f_divergence import DIVERGENCES, RatioBins, divergence_weight
from diffusion_opt.distillation.distribution.rollout import Noised, StudentRollout
from diffusion_opt.flow import Condition, VelocityModel, clean_from_velocity, expand_time, velocity_target
from diffusion_opt.training import Role
from diffusion_opt.training.settings import FREE


def dmd_gradient(
    x: Float[Tensor, "b *s"], teacher_x: Float[Tensor, "b *s"], fake_x: Float[Tensor, "b *s"]
) -> Float[Tensor, "b *s"]:
    """w (x_phi - x_T) with w = 1 / mean|x - x_T| of each item; `teacher_x`, `fake_x` are clean predictions at x_t."""
    return (fake_x - teacher_x) / expand_time(mean_distance(x, teacher_x), x)


def mean_distance(x: Float[Tensor, "b *s"], teacher_x: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    """mean|x - x_T| of each item, at least 1e-6."""
    return (x - teacher_x).abs().flatten(1).mean(1).clamp(min=1e-6)


def dmd_loss(
    x: Float[Tensor, "b *s"],
    teacher_x: Float[Tensor, "b *s"],
    fake_x: Float[Tensor, "b *s"],
    weight: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """A loss whose gradient in x is `dmd_gradient` over the number of elements (arXiv 2311.18828, eq. 8).

    `weight` scales the gradient of each item, see `f_divergence.py`.
    """
    with torch.no_grad():
        gradient = dmd_gradient(x, teacher_x, fake_x)
        target = x - (gradient if weight is None else expand_time(weight, x) * gradient)
    return 0.5 * (x - target).square().mean()


def fake_score_loss(
    velocity: Float[Tensor, "b *s"], x: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"]
) -> Float[Tensor, ""]:
    """Flow matching on the student's pictures: mean |v_phi - (e - x)|^2."""
    return (velocity - velocity_target(x, noise)).square().mean()


@dataclass(kw_only=True)
class DistributionMatching(StudentRollout):
    """A `Distiller`: `student` and `fake_score` are trained, `teacher` (guided) is not.

    The student must already be near a picture at t = 1: start from a trajectory student. With `head` (and `data`) the
    fake score and the head train together as one role.
    """

    fake_score: nn.Module
    teacher: VelocityModel
    head: FeatureHeads | None = None  # on features of the fake score
    gan: GanSettings = field(default_factory=GanSettings)
    head_rate: float = 1.0  # learning rate of the head over the fake score's
    divergence: str = "reverse_kl"  # a key of DIVERGENCES; others than reverse_kl need the head
    bins: RatioBins | None = None  # takes the ratio relative to its mean at each noise
    reference: Float[Tensor, "n *s"] | None = None  # pictures of the teacher (or real ones) for the alarms
    alarms: Alarms = field(default_factory=Alarms, metadata=FREE)
    notes: dict[str, float] = field(default_factory=dict, init=False, repr=False)  # what `alarm` saw, averaged

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if self.head is None and self.divergence != "reverse_kl":
            raise ValueError(
                f"{self.divergence} needs the ratio of densities: give head=FeatureHeads.of(fake_score, …)"
            )
        if self.head is not None and self.data is None:
            raise ValueError("the GAN head needs real pictures: give data=, or no head")

    @property
    def roles(self) -> dict[str, Role]:
        critic = self.fake_score
        if self.head is not None:
            critic = nn.ModuleDict({"fake_score": self.fake_score, "head": self.head})
        rates = {} if self.head is None else {"head": self.head_rate}
        return {"student": Role(self.student), self.critic: Role(critic, self.fake_rate, rates)}

    @property
    def kept(self) -> dict[str, nn.Module]:
        """What a checkpoint holds beside the networks."""
        return {} if self.bins is None else {"ratio_bins": self.bins}

    def student_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """The matching loss, with a head also `gan`, and what the alarms read (see `alarms.observed`)."""
        with torch.no_grad():
            teacher_x = batch.clean(self.teacher)
        if self.head is None:
            with torch.no_grad():
                fake_x, logits = batch.clean(self.fake_score), None
        else:
            with frozen(self.fake_score, self.head):
                velocity, logits = self.judge(batch.x_t, batch.t, batch.condition)
            fake_x = clean_from_velocity(batch.x_t, velocity, batch.t).detach()
        weight = None
        if self.divergence != "reverse_kl":
            weight = divergence_weight(self.divergence, logits, bins=self.bins, t=batch.t)
        losses = {"loss": dmd_loss(batch.x, teacher_x, fake_x, weight)}
        if weight is not None:  # near 1 both: the head tells nothing, and this is the reverse KL
            losses |= {"weight_low": weight.min(), "weight_high": weight.max()}
        if logits is not None and self.gan.student_weight:
            losses["gan"] = generator_loss(logits)
            losses["loss"] = losses["loss"] + self.gan.student_weight * losses["gan"]
        return losses | observed(batch.x.detach(), teacher_x, fake_x, self.reference, generator)

    def critic_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow matching on the student's pictures (`matching`); with a head also the terms of `critic_terms`."""
        velocity, fake = self.judge(batch.x_t, batch.t, batch.condition)
        matching = fake_score_loss(velocity, batch.x, batch.noise)
        if fake is None:
            return {"loss": matching}
        real, condition = self.real(generator, len(batch.x))
        terms = critic_terms(lambda *point: self.judge(*point)[1], real, condition, fake, batch.t, self.gan, generator)
        return terms | {"matching": matching, "loss": matching + terms["loss"]}

    def judge(
        self, x_t: Float[Tensor, "b *s"], t: Float[Tensor, " b"], condition: Condition | None
    ) -> tuple[Float[Tensor, "b *s"], Float[Tensor, "b heads"] | None]:
        """One pass of the fake score: its velocity, and the logits of the head if there is one."""
        if self.head is None:
            return self.fake_score(x_t, t, condition), None
        with captured(self.fake_score, self.head.layers) as features:
            velocity = self.fake_score(x_t, t, condition)
        return velocity, self.head(features)

    def alarm(self, step: int, values: dict[str, float]) -> str | None:
        """Why the run should stop, from the values of each step, averaged over the last ones; None if all is well."""
        self.notes = smoothed(self.notes, values)
        return self.alarms.check(step, self.notes)
