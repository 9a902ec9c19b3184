"""Distill a flow map: the methods of `flow_map.py` as settings of one `Distiller`.

    METHODS: flow_map, consistency, consistency_training, mean_flow, mean_flow_data, scm, shortcut

The student is one network for any number of steps (`flow_map_transformer` of a teacher), with guidance distilled in:
the teacher's velocity is the guided one. Points x_t are pictures with noise; only the methods that take their velocity
from the data learn from them.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory.flow_map import hop_target, limit_target, normalized_tangent
from diffusion_opt.distillation.trajectory.ode_distillation import pseudo_huber
from diffusion_opt.flow import ClassCondition, VelocityModel, expand_time, interpolate, randn, velocity_target
from diffusion_opt.training import Role


@dataclass(frozen=True, slots=True)
class FlowMapSettings:
    """A method: where the velocity of the hop comes from, how long the hop is, and which times are trained."""

    velocity: Literal["teacher", "data", "student"] = "teacher"  # "student": its own jump over the hop
    hop: Literal["random", "half", "jvp", "difference"] = "random"  # length; the last two are the limit of none
    hops: tuple[int, int] = (4, 32)  # "random": hops of 1/N of all time, N between these, even in log N
    share_end: float = 0.55  # of samples with r = 0: without enough of them one step stays untrained
    share_same: float = 0.15  # of samples with r = t, the velocity itself
    share_noise: float = 0.25  # of samples with t = 1, where sampling begins
    normalize: bool = False  # scale the tangent as sCM does
    difference_step: float = 1e-4  # half-width in time of "difference"; the embedding of time is fine to 1e-3

    def __post_init__(self) -> None:
        shares = (self.share_end, self.share_same, self.share_noise)
        if min(shares) < 0 or max(shares) > 1 or self.share_end + self.share_same > 1:
            raise ValueError(f"shares must lie in [0, 1], those of r = 0 and r = t together, got {self}")
        if not 1 <= self.hops[0] <= self.hops[1]:
            raise ValueError(f"hops must rise from at least 1, got {self.hops}")
        if self.velocity == "student" and self.hop != "half":
            raise ValueError(f"the student's own jump goes half of the way: hop must be 'half', got {self.hop!r}")


METHODS: dict[str, FlowMapSettings] = {
    "flow_map": FlowMapSettings(),
    "consistency": FlowMapSettings(share_end=1.0, share_same=0.0),
    "consistency_training": FlowMapSettings(velocity="data", share_end=1.0, share_same=0.0),
    "mean_flow": FlowMapSettings(hop="jvp"),
    "mean_flow_data": FlowMapSettings(velocity="data", hop="jvp"),
    "scm": FlowMapSettings(hop="jvp", share_end=1.0, share_same=0.0, normalize=True),
    "shortcut": FlowMapSettings(velocity="student", hop="half", share_same=0.4, share_end=0.3),
}


@dataclass
class FlowMapDistillation:
    """A `Distiller` that fits the two-time `student` to the guided `teacher` on noised pictures of `data`."""

    student: nn.Module
    teacher: VelocityModel
    data: ImageData | None
    settings: FlowMapSettings = FlowMapSettings()

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """Pseudo-Huber distance between u(x_t, t, r) and u*, over random pictures, noise and times."""
        device = generator.device
        index = torch.randint(len(self.data), (batch_size,), generator=generator, device=device)
        x, condition = self.data.images[index], ClassCondition(self.data.labels[index], len(self.data.class_names))
        noise = randn(tuple(x.shape), generator)
        t, s, r = sample_times(self.settings, batch_size, generator)
        x_t = interpolate(x, noise, t)
        target = self.target(x_t, t, s, r, condition, velocity_target(x, noise))
        prediction = self.student(x_t, t, condition, r=r)
        if self.settings.normalize:
            target = normalized_tangent(prediction, target)
        error = prediction - target
        return {"loss": pseudo_huber(error).mean(), "squared_error": error.detach().square().mean()}

    @torch.no_grad()
    def target(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        condition: ClassCondition,
        from_data: Float[Tensor, "b *s"],
    ) -> Float[Tensor, "b *s"]:
        """u* of this method; `from_data` is e - x."""

        def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.student(x, t, condition, r=r)

        settings = self.settings
        velocity = from_data if settings.velocity == "data" else self.teacher(x_t, t, condition)
        if settings.velocity == "student":
            velocity = torch.where(expand_time(t - s, x_t) > 0, jump(x_t, t, s), velocity)
        if settings.hop in ("random", "half"):
            return hop_target(x_t, t, s, r, velocity, jump)
        exact = settings.hop == "jvp"
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():  # the others have no forward derivative
            return limit_target(x_t, t, r, velocity, jump, None if exact else settings.difference_step)


def sample_times(
    settings: FlowMapSettings, num: int, generator: torch.Generator
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """t, s and r for `num` samples, r <= s <= t."""
    kind, u, v, w, z = torch.rand(5, num, generator=generator, device=generator.device)
    t = torch.where(w < settings.share_noise, 1.0, u.clamp(min=0.01))
    r = torch.where(kind < settings.share_end, 0.0, v * t)
    r = torch.where(kind >= 1 - settings.share_same, t, r)
    if settings.hop == "half":
        return t, (t + r) / 2, r
    low, high = (math.log(n) for n in settings.hops)
    s = t - torch.exp(-(low + (high - low) * z))
    return t, torch.maximum(s, r), r
