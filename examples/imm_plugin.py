"""A method of one's own, outside the package: inductive moment matching as a plugin.

    diffusion-opt distill --plugin examples/imm_plugin.py --method imm --teacher fashion-micro --steps 1 --set group=8

A jump t -> s of the student must give the distribution that its own jump r -> s gives, s <= r < t, with x_r on the line
of x_t (Zhou et al. 2025, arXiv 2503.07565). The two are compared by the maximum mean discrepancy (MMD) of small groups
of samples that share their times. It learns from real samples alone; the teacher gives the first weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation import methods
from diffusion_opt.distillation.builders import Task
from diffusion_opt.flow import expand_time, interpolate, randn
from diffusion_opt.subjects import Samples
from diffusion_opt.training import Role


@dataclass(frozen=True, slots=True)
class MomentSettings:
    """The settings that `--set` changes."""

    group: int = 4  # samples that share their times
    gap: float = 1 / 12  # of all time, between t and r
    share_noise: float = 0.25  # of the groups with t = 1
    share_end: float = 0.5  # of the groups with s = 0

    def __post_init__(self) -> None:
        if self.group < 2 or not 0 < self.gap < 1:
            raise ValueError(f"group must be at least 2 and gap in (0, 1), got {self.group} and {self.gap}")


@dataclass
class MomentMatching:
    """A `Distiller`; `student` is a two-time network."""

    student: nn.Module
    data: Samples
    moments: MomentSettings = MomentSettings()

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """MMD between the ends of two jumps, in groups; a batch is as many whole groups as fit."""
        size, options = self.moments.group, self.moments
        if batch_size < size:
            raise ValueError(f"a group has {size} samples, the batch {batch_size}: enlarge it or lower group")
        num = batch_size // size
        u, v, w = torch.rand(3, num, generator=generator, device=generator.device)
        t = torch.where(w < options.share_noise, 1.0, u.clamp(min=0.02))
        s = torch.where(v < options.share_end, 0.0, (v - options.share_end) / (1 - options.share_end) * t)
        r = torch.maximum(t - options.gap, s)
        t, s, r = (time.repeat_interleave(size) for time in (t, s, r))
        x, condition = self.data.draw(num * size, generator)
        noise = randn(tuple(x.shape), generator)
        end = self.jump(interpolate(x, noise, t), t, s, condition)
        with torch.no_grad():
            target = self.jump(interpolate(x, noise, r), r, s, condition)
        scale = (t - s).view(num, size)[:, :1, None].clamp(min=1e-3)  # what is left of a jump is of this size
        a, b = (y.flatten(1).view(num, size, -1) for y in (end, target))
        loss = mean_discrepancy(a, b, scale).mean()
        return {"loss": loss, "squared_error": (end - target).detach().square().mean()}

    def jump(self, x: Tensor, t: Tensor, s: Tensor, condition: object) -> Tensor:
        """x_s from x_t, one pass."""
        return x - expand_time(t - s, x) * self.student(x, t, condition, r=s)


def mean_discrepancy(
    a: Float[Tensor, "n g d"], b: Float[Tensor, "n g d"], scale: Float[Tensor, "n 1 1"]
) -> Float[Tensor, " n"]:
    """Squared MMD of each group under the paper's Laplace kernel exp(-|a - b| / (scale sqrt(d)))."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = (torch.cdist(x, y).square() + 1e-6).sqrt() / x.shape[-1] ** 0.5
        return torch.exp(-distance / scale).mean((1, 2))

    return kernel(a, a) - 2 * kernel(a, b) + kernel(b, b)


def build(task: Task) -> MomentMatching:
    """The `Distiller` of a task."""
    return MomentMatching(task.student, task.data, task.settings)


def register() -> None:
    """Called by `diffusion_opt.plugins`."""
    method = methods.Method(
        "moments of two jumps agree; from real samples alone",
        "trajectory",
        build=build,
        settings=MomentSettings(),
        images="learned",
        guided=False,
        **methods.JUMPS,
    )
    methods.register("imm", method)
