"""What every technique acts on: a velocity model v = model(x_t, t, condition).

The protocol is all that samplers, losses and caches know of a network. Two implementations matter: the closed-form
`GaussianMixtureVelocity` (the truth the rest is tested against in milliseconds) and one adapter for each diffusers
transformer family (`diffusion_opt.models`). A two-time model, a flow map, takes the target time as `r` and returns
the mean velocity of the jump from t to r.

Guidance is a wrapper and not a flag (Ho & Salimans 2022, arXiv 2207.12598, in the form of diffusers and Imagen):

    v_w = v_null + w (v_cond - v_null),      w = 1 is no guidance and costs one pass, anything else costs two.

Guidance in a limited interval of times (Kynkäänniemi et al. 2024, arXiv 2404.07724) leaves w = 1 outside it. Near t = 1
guidance narrows what a picture may become before there is anything to see, and costs variety.

Qwen-Image's pipeline gives each token of v_w the length that it has in v_cond, so that a large w turns it and does not
lengthen it: `keeps_length`.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.flow.path import expand_time

ALL_TIMES = (0.0, 1.0)  # the interval that limits nothing


class Condition(Protocol):
    """What a sample is asked to be: opaque to samplers and losses, which may only index, count and drop it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index) -> Self: ...

    def drop(self, mask: Bool[Tensor, " b"] | None = None) -> Self:
        """The same batch with the condition removed where `mask` is true (everywhere by default)."""
        ...


@dataclass(frozen=True)
class ClassCondition:
    """A class label per sample; the label `num_classes` stands for "no class" (used for guidance)."""

    labels: Int[Tensor, " b"]
    num_classes: int

    def __post_init__(self) -> None:
        if self.labels.numel() and not (int(self.labels.min()) >= 0 and int(self.labels.max()) <= self.num_classes):
            raise ValueError(
                f"labels must lie in 0 … {self.num_classes - 1} (or {self.num_classes} for no class), "
                f"got {int(self.labels.min())} … {int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "ClassCondition":
        return ClassCondition(self.labels[index], self.num_classes)

    def drop(self, mask: Bool[Tensor, " b"] | None = None) -> "ClassCondition":
        null = torch.full_like(self.labels, self.num_classes)
        return ClassCondition(null if mask is None else torch.where(mask, null, self.labels), self.num_classes)


class VelocityModel(Protocol):
    """Anything that gives the velocity at (x_t, t) under a condition."""

    def __call__(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        condition: Condition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *s"]: ...


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The interval of times. Raises ValueError unless it rises and lies in [0, 1]."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"the guidance interval must rise and lie in [0, 1], got {interval}")
    return interval


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance around a velocity model: two passes, mixed by `scale` (w in the formula above).

    `interval` holds the times t, both ends included, at which `scale` counts. Raises ValueError for an empty one.
    """

    model: VelocityModel
    scale: float
    interval: tuple[float, float] = ALL_TIMES
    keeps_length: bool = False  # of each vector along the last dimension: that of the conditional velocity

    def __post_init__(self) -> None:
        check_interval(self.interval)

    def __call__(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        condition: Condition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *s"]:
        """The guided velocity. Raises ValueError without a condition: there is nothing to guide towards."""
        if condition is None:
            raise ValueError("guidance needs a condition, got None; use the model itself for unconditional samples")
        two_time = {} if r is None else {"r": r}
        conditional = self.model(x_t, t, condition, **two_time)
        if self.scale == 1:
            return conditional
        unconditional = self.model(x_t, t, condition.drop(), **two_time)
        time = expand_time(t, x_t)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.keeps_length:
            guided = guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return torch.where(inside, guided, conditional)
