"""Whose turn it is, and what the student makes: the half that all distribution methods share.

A student of one step turns noise into a picture in one pass. A student of several has a ladder of times 1 = t_0 > t_1 >
… > 0, and what it must learn is its own pass at each rung, on the points that it meets there itself. So training rolls
the student out without gradient to a random rung, and takes the gradient through the pass at that rung only: backward
simulation (DMD2, Yin et al. 2024, arXiv 2405.14867, section 4.5). What lies between two rungs depends on the student:

    between="noise"   x = x_t - t u(x_t, t), then fresh noise to the next rung      (sampler: FlowMatchLCMScheduler)
    between="jump"    x_r = x_t - (t - r) u(x_t, t, r), a two-time flow map          (sampler: Euler, flow_map=True)

With "jump" the gradient goes through the jump t -> r and the jump r -> 0 that ends it, after all earlier rungs were
simulated without gradient. (AnyFlow, arXiv 2605.13724, has three segments: one jump with gradient, a fine step, and the
jump to 0.) `from_data` replaces the simulation by noised pictures of the data, the default of FastGen 0.1 and of
modelopt.torch.fastgen: cheaper, but the student then trains on points that it does not visit when it samples.

Every sample of a batch has its own rung, and only those still on their way are rolled on. The processes of a sharded
student must all make the same passes, so there the others go along and what became of them is dropped. Nothing is kept
between steps: no replay of old pictures, and all randomness comes from the step's generator.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffusion_opt.flow import Condition, VelocityModel, clean_from_velocity, expand_time, interpolate, randn
from diffusion_opt.subjects import UNCONDITIONAL, Conditions, Samples
from diffusion_opt.training import is_sharded


def jump(
    student: nn.Module,
    x_t: Float[Tensor, "b *s"],
    t: Float[Tensor, " b"],
    r: Float[Tensor, " b"],
    condition: Condition | None,
) -> Float[Tensor, "b *s"]:
    """x_r = x_t - (t - r) u, one pass from t (B,) to r (B,); r = 0 gives the clean prediction.

    A student with `two_time` is asked for the mean velocity of this jump, another for its velocity at t.
    """
    second = {"r": r} if getattr(student, "two_time", False) else {}
    return x_t - expand_time(t - r, x_t) * student(x_t, t, condition, **second)


@dataclass(frozen=True, slots=True, eq=False)
class Noised:
    """Pictures x of the student, noised: x_t = (1 - t) x + t noise. x carries its gradient when the student learns."""

    x: Float[Tensor, "b *s"]
    noise: Float[Tensor, "b *s"]
    t: Float[Tensor, " b"]
    condition: Condition | None
    x_t: Float[Tensor, "b *s"]

    def clean(self, model: VelocityModel) -> Float[Tensor, "b *s"]:
        """The clean prediction of a velocity model at x_t."""
        return clean_from_velocity(self.x_t, model(self.x_t, self.t, self.condition), self.t)


@dataclass(kw_only=True)
class StudentRollout(ABC):
    """The student, how it makes pictures, and when it is trained; the methods of this room add the losses.

    Between two updates of the student its critic, the role named `critic`, gets `fake_updates`.
    """

    student: nn.Module
    sample_shape: tuple[int, ...]  # of one picture or clip; (2,) for points in the plane
    conditions: Conditions = UNCONDITIONAL  # what may be asked for; by default nothing
    times: tuple[float, ...] = (1.0,)  # the ladder, from 1 down; the step to 0 is understood
    between: Literal["noise", "jump"] = "noise"
    data: Samples | None = None
    from_data: bool = False  # start at rungs below 1 from noised data instead of the student's own points
    fake_updates: int = 4  # of the critic between two of the student (K - 1)
    warmup: int = 50  # updates of the critic before the first of the student
    fake_rate: float = 2.0  # learning rate of the critic over the student's
    t_min: float = 0.02  # noise levels at which student and teacher are compared, evenly in [t_min, t_max]
    t_max: float = 0.98

    critic: ClassVar[str] = "fake_score"

    def __post_init__(self) -> None:
        falls = all(t > r for t, r in pairwise(self.times))
        if not self.times or self.times[0] != 1 or self.times[-1] <= 0 or not falls:
            raise ValueError(f"times must fall from 1 and leave out the final 0, got {self.times}")
        if self.between == "jump" and not getattr(self.student, "two_time", False):
            raise ValueError("between='jump' needs a two-time student (a flow map); use between='noise' for this one")
        if self.from_data and self.data is None:
            raise ValueError("from_data=True starts from noised data: give data=, or simulate with from_data=False")
        if self.fake_updates < 0 or self.warmup < 0:
            raise ValueError(
                f"updates must not be negative, got fake_updates={self.fake_updates}, warmup={self.warmup}"
            )

    def turn(self, step: int) -> str:
        since = step - self.warmup
        return "student" if since >= 0 and since % (self.fake_updates + 1) == 0 else self.critic

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        """The losses of the turn on fresh pictures of the student; see `student_losses` and `critic_losses`."""
        with torch.set_grad_enabled(turn == "student"):
            x, condition = self.generate(generator, batch_size)
        t = torch.rand(batch_size, generator=generator, device=generator.device)
        t = self.t_min + (self.t_max - self.t_min) * t
        noise = randn(tuple(x.shape), generator)
        batch = Noised(x, noise, t, condition, interpolate(x, noise, t))
        return self.student_losses(batch, generator) if turn == "student" else self.critic_losses(batch, generator)

    @abstractmethod
    def student_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """The "loss" of the student and what else is logged; the method's own."""

    @abstractmethod
    def critic_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """The same for the critic."""

    def generate(self, generator: torch.Generator, batch_size: int) -> tuple[Float[Tensor, "b *s"], Condition | None]:
        """Pictures of the student from random rungs with random conditions; the gradient goes through the last pass."""
        noise = randn((batch_size, *self.sample_shape), generator)
        if self.from_data:
            clean, condition = self.real(generator, batch_size)
        else:
            condition = self.conditions.draw(batch_size, generator)
        rungs = torch.randint(len(self.times), (batch_size,), generator=generator, device=generator.device)
        ladder = torch.tensor([*self.times, 0.0], device=generator.device)
        if self.from_data:
            x_t = interpolate(clean, noise, ladder[rungs])
        else:
            x_t = self.simulate(noise, condition, rungs, generator)
        if self.between == "noise":
            return jump(self.student, x_t, ladder[rungs], ladder[rungs].new_zeros(batch_size), condition), condition
        r = ladder[rungs + 1]
        x_r = jump(self.student, x_t, ladder[rungs], r, condition)
        on = self.going(r > 0)
        if not len(on):
            return x_r, condition
        end = jump(self.student, x_r[on], r[on], torch.zeros_like(r[on]), None if condition is None else condition[on])
        return x_r.index_copy(0, on, end), condition

    @torch.no_grad()
    def simulate(
        self,
        noise: Float[Tensor, "b *s"],
        condition: Condition | None,
        rungs: Int[Tensor, " b"],
        generator: torch.Generator,
    ) -> Float[Tensor, "b *s"]:
        """The points at which the student itself arrives on each sample's rung, from noise, without gradient."""
        x_t = noise.clone()
        for rung, (t, r) in enumerate(pairwise(self.times)):
            on = self.going(rungs > rung)
            if not len(on):
                break
            here = torch.full((len(on),), t, device=noise.device)
            there = torch.full_like(here, r if self.between == "jump" else 0.0)
            x = jump(self.student, x_t[on], here, there, None if condition is None else condition[on])
            if self.between == "noise":
                x = interpolate(x, randn(tuple(x.shape), generator), torch.full_like(here, r))
            arrived = rungs[on] > rung
            x_t[on[arrived]] = x[arrived]
        return x_t

    def going(self, wanted: Bool[Tensor, " b"]) -> Int[Tensor, " n"]:
        """Who takes part in a pass of the student: the wanted ones, or all if it (or what it adapts) is sharded."""
        return (wanted | is_sharded(getattr(self.student, "base", self.student))).nonzero().squeeze(1)

    def real(self, generator: torch.Generator, batch_size: int) -> tuple[Float[Tensor, "b *s"], Condition | None]:
        """Random pictures of the data with their conditions, if the student takes any."""
        x, condition = self.data.draw(batch_size, generator)
        return x, condition if len(self.conditions) else None
