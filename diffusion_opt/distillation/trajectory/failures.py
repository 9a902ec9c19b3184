"""A gallery of failures: settings that break a trajectory method, each beside the one change that cures it.

What goes wrong in distillation is seldom an error message. The loss falls, and the pictures are blurred, unchanged, or
of one kind. Each entry is a pair of methods that differ by the cure; both run on the plane (`PointVelocity` after
`GaussianMixtureVelocity`) in seconds, where the truth is known and the damage can be measured
(`evaluation.sliced_wasserstein`; a test does).

    starved_end     jumps to r = 0 are hardly trained: many steps work, one step does not
    coarse_hop      hops as long as the whole path: the student learns the teacher's one Euler step, no more
    frozen_hop      hops that the arithmetic rounds away: u* is u, and what is left to learn from is rounding (in
                    bfloat16 this begins at 1/256; Adam rescales small gradients, so merely small hops still teach)
    wild_tangent    sCM on a network whose embedding of time is wide: du/dt is noise, and no scaling of it helps
    fresh_noise     consistency training whose hop ends in another noise than it began: the student learns a mean
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.trajectory.flow_map_distillation import METHODS, FlowMapDistillation, FlowMapSettings
from diffusion_opt.flow import VelocityModel, expand_time, interpolate, randn
from diffusion_opt.subjects import Samples


class FreshNoise(FlowMapDistillation):
    """Consistency training with a mistake: x_s gets noise of its own, so it is on another path than x_t."""

    def data_velocity(
        self,
        x: Float[Tensor, "b *s"],
        noise: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        generator: torch.Generator,
    ) -> Float[Tensor, "b *s"]:
        """The velocity from x_t to a point x_s = (1 - s) x + s e' with fresh noise e'."""
        other = interpolate(x, randn(tuple(x.shape), generator), s)
        return (interpolate(x, noise, t) - other) / expand_time(t - s, x)


@dataclass(frozen=True, slots=True)
class Failure:
    """`broken` fails, visibly when sampled in one step; `cured` differs by the cure and does not."""

    symptom: str
    cure: str
    broken: FlowMapSettings
    cured: FlowMapSettings
    broken_class: type[FlowMapDistillation] = FlowMapDistillation
    broken_waves: int = 4  # width of the broken student's time embedding, `PointVelocity(waves=…)`; the cured has 4

    def distiller(self, cured: bool, student: nn.Module, teacher: VelocityModel, data: Samples) -> FlowMapDistillation:
        """The broken or the cured method, ready for `train`; the student's kind is `self.cured.two_time`."""
        if cured:
            return FlowMapDistillation(student, teacher, data, self.cured)
        return self.broken_class(student, teacher, data, self.broken)


FAILURES = {
    "starved_end": Failure(
        symptom="four steps are fine, one step misses: the jump from noise to data was hardly ever trained",
        cure="half of the samples with r = 0, a quarter with t = 1 (share_end, share_noise)",
        broken=replace(METHODS["flow_map"], share_end=0.0, share_same=0.9, share_noise=0.0),
        cured=METHODS["flow_map"],
    ),
    "coarse_hop": Failure(
        symptom="points are drawn to the middle: one long Euler step of the teacher is what the student learned",
        cure="hops of 1/4 to 1/32 of all time (hops)",
        broken=replace(METHODS["consistency"], hops=(1, 2)),
        cured=METHODS["consistency"],
    ),
    "frozen_hop": Failure(
        symptom="the loss is almost zero from the first step, and the student drifts: it learns from rounding errors",
        cure="hops of 1/4 to 1/32 of all time (hops)",
        broken=replace(METHODS["consistency"], hops=(10**12, 10**12)),
        cured=METHODS["consistency"],
    ),
    "wild_tangent": Failure(
        symptom="the loss jumps about, points scatter: the derivative in time is that of the embedding's fast waves",
        cure="an embedding of time with few slow waves (arXiv 2410.11081, section 4.1), or a hop in place of the limit",
        broken=METHODS["scm"],
        cured=METHODS["scm"],
        broken_waves=8,
    ),
    "fresh_noise": Failure(
        symptom="points contract to the middle of their class: the target is a mean over noises",
        cure="the same noise at both ends of the hop",
        broken=METHODS["consistency_training"],
        cured=METHODS["consistency_training"],
        broken_class=FreshNoise,
    ),
}
