"""Distill a flow map: the methods of `flow_map.py` as settings of one `Distiller`.

    METHODS: flow_map, consistency, consistency_training, lcm, mean_flow, mean_flow_difference, mean_flow_data, scm,
             shortcut

Two kinds of student come out, and the settings say which (`two_time`):

    two times    any jump t -> r, so any number of Euler steps; the network is `flow_map_transformer` of a teacher
    one time     jumps to r = 0 only: the consistency family. The network is a plain copy of the teacher (a two-time
                 one is told r = 0); more than one step noises the prediction again (`models.set_ladders`)

Guidance is distilled in. Either `teacher` is a `Guided` one and its scale is fixed, or, with a range in the settings,
it is the unguided model, a scale is drawn for each sample, and the student is called with `guidance=w` as well: LCM
(Luo et al. 2023, arXiv 2310.04378). Points x_t are pictures with noise; only the methods that take their velocity from
the data learn from them. A hop of data goes along one straight line, the same noise at both of its ends (without that
consistency training learns the mean, see `failures.py`).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_opt.distillation.trajectory.flow_map import (
    Velocity,
    hop_target,
    limit_target,
    normalized_tangent,
    own_guidance,
    ratio_times,
)
from diffusion_opt.distillation.trajectory.guidance import check_scales, draw_scales, guided_velocity
from diffusion_opt.distillation.trajectory.metrics import DISTANCES
from diffusion_opt.flow import ALL_TIMES, Condition, VelocityModel, expand_time, interpolate, randn, velocity_target
from diffusion_opt.flow.velocity import check_interval
from diffusion_opt.subjects import Samples
from diffusion_opt.training import Role


@dataclass(frozen=True, slots=True)
class FlowMapSettings:
    """A method: where the velocity of the hop comes from, how long the hop is, and which times are trained."""

    velocity: Literal["teacher", "data", "student"] = "teacher"  # "student": its own jump over the hop
    hop: Literal["random", "ratio", "half", "jvp", "difference"] = "random"  # length; the last two: the limit of none
    hops: tuple[int, int] = (4, 32)  # "random": hops of 1/N of all time, N between these, even in log N
    doublings: int = 5  # "ratio": how often the hop halves during training, evenly spread over it
    share_end: float = 0.55  # of samples with r = 0: without enough of them one step stays untrained
    share_same: float = 0.15  # of samples with r = t, the velocity itself
    share_noise: float = 0.25  # of samples with t = 1, where sampling begins
    distance: Literal["huber", "adaptive", "squared"] = "huber"  # see `metrics.py`
    normalize: bool = False  # scale the tangent as sCM does
    warmup: float = 0.0  # limits: share of training over which du/dt comes in
    difference_step: float = 0.01  # half-width in time of "difference"; FLUX.2 embeds 1000 t, waves shorter than 0.005
    guidance: tuple[float, float] | None = None  # the student's input, drawn from this range; None: in the teacher
    own_guidance: float = 1.0  # from the data, by the student's own velocity (`flow_map.own_guidance`); 1: none
    own_mixing: float = 0.0  # share of the student's own conditional velocity in it
    own_drop: float = 0.1  # share of samples without condition, which its unconditional velocity is learned from
    own_interval: tuple[float, float] = ALL_TIMES  # times at which it counts

    def __post_init__(self) -> None:
        shares = (self.share_end, self.share_same, self.share_noise)
        if min(shares) < 0 or max(shares) > 1 or self.share_end + self.share_same > 1:
            raise ValueError(f"shares must lie in [0, 1], those of r = 0 and r = t together, got {self}")
        if not 1 <= self.hops[0] <= self.hops[1]:
            raise ValueError(f"hops must rise from at least 1, got {self.hops}")
        if self.velocity == "student" and self.hop != "half":
            raise ValueError(f"the student's own jump goes half of the way: hop must be 'half', got {self.hop!r}")
        if self.velocity == "student" and not self.two_time:
            raise ValueError(f"the student's own jumps need r > 0: share_end must be below 1, got {self.share_end}")
        if self.doublings < 1 or not 0 <= self.warmup <= 1:
            raise ValueError(
                f"doublings must be at least 1 and warmup in [0, 1], got {self.doublings} and {self.warmup}"
            )
        if self.guides_itself and (self.velocity != "data" or not self.two_time):
            raise ValueError("own_guidance is for two-time students of the data; a teacher brings its guidance with it")
        if not (0 <= self.own_mixing < 1 and 0 <= self.own_drop < 1):
            raise ValueError(f"own_mixing and own_drop must lie in [0, 1), got {self.own_mixing} and {self.own_drop}")
        check_interval(self.own_interval)
        if self.guidance is not None:
            check_scales(self.guidance)
            if self.two_time:
                raise ValueError("a student has one slot: for a guidance scale (share_end=1, r = 0) or a second time")

    @property
    def two_time(self) -> bool:
        """Whether the student knows a second time: with r = 0 always, it need not."""
        return self.share_end < 1

    @property
    def guides_itself(self) -> bool:
        """Whether the velocity of the data is made guided by the student's own."""
        return self.own_guidance != 1 or self.own_mixing > 0


_TO_DATA = {"share_end": 1.0, "share_same": 0.0}  # r = 0 always
METHODS: dict[str, FlowMapSettings] = {
    "flow_map": FlowMapSettings(),
    "consistency": FlowMapSettings(**_TO_DATA),
    "consistency_training": FlowMapSettings(velocity="data", hop="ratio", **_TO_DATA),
    "lcm": FlowMapSettings(guidance=(1.0, 3.0), **_TO_DATA),
    "mean_flow": FlowMapSettings(hop="jvp"),
    "mean_flow_difference": FlowMapSettings(hop="difference"),
    "mean_flow_data": FlowMapSettings(velocity="data", hop="jvp", distance="adaptive"),
    "scm": FlowMapSettings(hop="jvp", normalize=True, warmup=0.2, distance="squared", **_TO_DATA),
    "shortcut": FlowMapSettings(velocity="student", hop="half", share_same=0.7, share_end=0.15),
}


@dataclass
class FlowMapDistillation:
    """A `Distiller` that fits `student` to the `teacher` on noised pictures of `data`.

    Which teacher (guided or not) and which network (one time or two) the settings want is said at the top of the file.
    Raises ValueError for a network that does not fit them.
    """

    student: nn.Module
    teacher: VelocityModel
    data: Samples | None
    settings: FlowMapSettings = FlowMapSettings()
    share: float = field(default=0.0, init=False)  # of training that is done, as the loop last told it

    def __post_init__(self) -> None:
        self._given_r = getattr(self.student, "two_time", self.settings.two_time)
        if self.settings.two_time and not self._given_r:
            raise ValueError("these settings train jumps to any r, the network knows one time: use a two-time network")
        if self.settings.guidance is not None and self._given_r:
            raise ValueError("with guidance as an input the network takes a scale and no second time")

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def progress(self, share: float) -> None:
        """Take note of the share of the budget that is used, 0 … 1: hops shrink and tangents come in with it."""
        self.share = share

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """Distance between u(x_t, t, r) and u*, over random pictures, noise and times."""
        settings = self.settings
        x, condition = self.data.draw(batch_size, generator)
        noise = randn(tuple(x.shape), generator)
        t, s, r = self.times(batch_size, generator)
        scale = None if settings.guidance is None else draw_scales(batch_size, settings.guidance, generator)
        x_t = interpolate(x, noise, t)
        from_data = self.data_velocity(x, noise, t, s, generator)
        if settings.guides_itself:
            from_data, condition = self.guided_by_itself(x_t, t, condition, from_data, generator)
        target = self.target(x_t, t, s, r, condition, from_data, scale)
        prediction = self.jump(condition, scale)(x_t, t, r)
        if settings.normalize:
            target = normalized_tangent(prediction, target)
        error = prediction - target
        loss = self.reduce(DISTANCES[settings.distance](error), t)
        return {"loss": loss, "squared_error": error.detach().square().mean()}

    def times(
        self, num: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The times t >= s >= r of `num` samples."""
        return sample_times(self.settings, num, generator, self.share)

    def reduce(self, each: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of a batch from those of its samples."""
        return each.mean()

    @torch.no_grad()
    def guided_by_itself(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        condition: Condition,
        velocity: Float[Tensor, "b *s"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "b *s"], Condition]:
        """The data's velocity with guidance, and the conditions; where these are dropped the velocity stays plain."""
        settings, num = self.settings, len(t)
        conditional = self.jump(condition)(x_t, t, t) if settings.own_mixing else velocity
        unconditional = self.jump(condition.drop())(x_t, t, t)
        scale = torch.full_like(t, settings.own_guidance)
        guided = own_guidance(velocity, conditional, unconditional, scale, settings.own_mixing)
        low, high = settings.own_interval
        drop = torch.rand(num, generator=generator, device=generator.device) < settings.own_drop
        keep = ((t >= low) & (t <= high) & ~drop).to(t.dtype)
        return torch.where(expand_time(keep, x_t) > 0, guided, velocity), condition.drop(drop)

    def data_velocity(
        self,
        x: Float[Tensor, "b *s"],
        noise: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        generator: torch.Generator,
    ) -> Float[Tensor, "b *s"]:
        """e - x: the line through x_t also passes x_s."""
        return velocity_target(x, noise)

    def jump(self, condition: Condition, scale: Float[Tensor, " b"] | None = None) -> Velocity:
        """The student as u(x, t, r) under a condition; one that knows one time jumps to 0 whatever r is."""
        if self._given_r:
            return lambda x, t, r: self.student(x, t, condition, r=r)
        given = {} if scale is None else {"guidance": scale}
        return lambda x, t, r: self.student(x, t, condition, **given)

    @torch.no_grad()
    def target(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        condition: Condition,
        from_data: Float[Tensor, "b *s"],
        scale: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *s"]:
        """u* of this method; `from_data` is the velocity of the hop along the data, `scale` that of the guidance."""
        settings, jump = self.settings, self.jump(condition, scale)
        velocity = self.velocity(x_t, t, s, condition, from_data, scale)
        if settings.hop not in ("jvp", "difference"):
            return hop_target(x_t, t, s, r, velocity, jump)
        exact = settings.hop == "jvp"
        tangent = min(1.0, self.share / settings.warmup) if settings.warmup else 1.0
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():  # the others have no forward derivative
            return limit_target(x_t, t, r, velocity, jump, None if exact else settings.difference_step, tangent)

    def velocity(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        condition: Condition,
        from_data: Float[Tensor, "b *s"],
        scale: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *s"]:
        """The velocity of the hop t -> s: the data's, the teacher's (with guidance `scale`), or the student's own."""
        if self.settings.velocity == "data":
            return from_data
        if scale is not None:
            velocity = guided_velocity(self.teacher, x_t, t, condition, scale)
        else:
            velocity = self.teacher(x_t, t, condition)
        if self.settings.velocity == "student":
            jump = self.jump(condition, scale)
            return torch.where(expand_time(t - s, x_t) > 0, jump(x_t, t, s), velocity)
        return velocity


def random_hops(hops: tuple[int, int], share: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Lengths 1/N, N even in its logarithm between two numbers, from shares in [0, 1]."""
    low, high = (math.log(n) for n in hops)
    return torch.exp(-(low + (high - low) * share))


def sample_times(
    settings: FlowMapSettings, num: int, generator: torch.Generator, share: float = 0.0
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """t, s and r for `num` samples, r <= s <= t, when `share` of the training is done."""
    kind, u, v, w, z = torch.rand(5, num, generator=generator, device=generator.device)
    t = torch.where(w < settings.share_noise, 1.0, u.clamp(min=0.01))
    r = torch.where(kind < settings.share_end, 0.0, v * t)
    r = torch.where(kind >= 1 - settings.share_same, t, r)
    if settings.hop == "half":
        return t, (t + r) / 2, r
    if settings.hop == "ratio":
        stage = min(int(share * settings.doublings), settings.doublings - 1)
        return t, torch.maximum(ratio_times(t, stage), r), r
    return t, torch.maximum(t - random_hops(settings.hops, z), r), r
