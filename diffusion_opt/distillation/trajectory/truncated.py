"""Truncated consistency models (TCM): a second stage for a consistency student, on the noisy part of time alone.

A consistency student of one step is sampled from t = 1 and nowhere else, but most of its training goes to times near
the data, where the task is easy and the capacity is not missed. TCM (Lee et al. 2024, arXiv 2410.14895) freezes the
student of the first stage, which answers below a transition time t', and trains on for t >= t' only:

    target of t -> s -> 0   =  the hop of `flow_map.py`, its end by the student where s >= t', by the first stage else
    at t = t' itself        the student is held to the first stage: without this boundary it would drift to a constant,
                            which is a solution of the truncated problem too (section 3.2)

A share of the batch stands at the boundary, and its mean loss counts with a weight of its own (0.25 and 0.1 here, as in
FastGen). The first stage is the start of the student, copied as it is handed over.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.trajectory.flow_map import hop_target
from diffusion_opt.distillation.trajectory.flow_map_distillation import (
    FlowMapDistillation,
    FlowMapSettings,
    random_hops,
)
from diffusion_opt.flow import Condition, expand_time


@dataclass(frozen=True, slots=True)
class TruncatedSettings:
    """Where time is cut, how the boundary counts, and the hops above it."""

    transition: float = 0.5  # t'
    boundary: float = 0.25  # share of the samples at t'
    boundary_weight: float = 0.1  # of their mean loss
    share_noise: float = 0.25  # of the other samples at t = 1
    hops: tuple[int, int] = (4, 32)  # hops of 1/N of all time, N between these
    distance: str = "huber"

    def __post_init__(self) -> None:
        if not 0 < self.transition < 1 or not 0 <= self.boundary < 1 or self.boundary_weight < 0:
            raise ValueError(f"0 < transition < 1, 0 <= boundary < 1 and a weight of 0 or more are needed, got {self}")

    @property
    def flow_map(self) -> FlowMapSettings:
        """The settings of the identity that this is a part of."""
        return FlowMapSettings(
            hops=self.hops, share_end=1.0, share_same=0.0, share_noise=self.share_noise, distance=self.distance
        )


@dataclass
class TruncatedConsistency(FlowMapDistillation):
    """A `Distiller` as `FlowMapDistillation`; `first` is the student of the first stage, frozen."""

    first: nn.Module = field(kw_only=True)
    truncated: TruncatedSettings = TruncatedSettings()

    def times(
        self, num: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
        """t from t' up, the share `boundary` at t' itself; the end s of its hop; r = 0."""
        cut = self.truncated.transition
        u, v, w, z = torch.rand(4, num, generator=generator, device=generator.device)
        t = torch.where(w < self.truncated.share_noise, 1.0, cut + (1 - cut) * u)
        t = torch.where(v < self.truncated.boundary, cut, t)
        return t, (t - random_hops(self.truncated.hops, z)).clamp(min=0), torch.zeros_like(t)

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
        """The hop's target, its end by whoever answers at s; at the boundary what the first stage says."""
        cut, own = self.truncated.transition, self.jump(condition)

        def end(x: Tensor, at: Tensor, to: Tensor) -> Tensor:
            return torch.where(expand_time(at, x) >= cut, own(x, at, to), self.first(x, at, condition))

        target = hop_target(x_t, t, s, r, self.velocity(x_t, t, s, condition, from_data, scale), end)
        return torch.where(expand_time(t, x_t) == cut, self.first(x_t, t, condition), target)

    def reduce(self, each: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """The mean above the boundary, and that at the boundary times its weight; a part without samples is 0."""
        at_cut = t == self.truncated.transition
        above, edge = (torch.where(part, each, 0).sum() / part.sum().clamp(min=1) for part in (~at_cut, at_cut))
        return above + self.truncated.boundary_weight * edge
