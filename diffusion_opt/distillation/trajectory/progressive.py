"""Progressive distillation: halve the number of steps, again and again; each stage's student teaches the next.

A student of n steps learns, from any x_t on its grid t = 1, 1 - 1/n, …, 1/n, to make in one Euler step what its teacher
makes in two of half the length (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2). In velocities:

    u*(x_t, t) = sg{ [ v(x_t, t) + v(x_s, s) ] / 2 },      s = t - 1/2n,  x_s = x_t - (t - s) v(x_t, t),  v the teacher

It is the identity of `flow_map.py` with r = t - 1/n, s in the middle, and both jumps by the teacher; the student's own
jumps in their place would be the shortcut method. Guidance goes in with the first stage, whose teacher is the guided
one; `first_hops` lets that teacher take more than two steps, since its own are less exact than a student's jumps.

A stage is a training run of its own, in a folder of its own, with the learning rate falling to its end: the trainer
knows nothing of stages, a stage in progress resumes as any run does, and finished ones are read back. All students of
the way remain: 8 -> 4 -> 2 -> 1 gives those of 4, 2 and 1 steps. Each is sampled by the plain Euler scheduler at its
own number of steps.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.trajectory.metrics import pseudo_huber
from diffusion_opt.flow import Condition, VelocityModel, expand_time, interpolate, randn
from diffusion_opt.subjects import Samples
from diffusion_opt.training import Role, TrainConfig, TrainResult, train


@torch.no_grad()
def progressive_target(
    teacher: VelocityModel,
    x_t: Float[Tensor, "b *s"],
    t: Float[Tensor, " b"],
    r: Float[Tensor, " b"],
    condition: Condition,
    hops: int = 2,
) -> Float[Tensor, "b *s"]:
    """(x_t - x_r) / (t - r) with x_r after `hops` equal Euler steps of the teacher from t to r < t; no gradient."""
    x, velocities, hop = x_t, torch.zeros_like(x_t), (t - r) / hops
    for k in range(hops):
        velocity = teacher(x, t - k * hop, condition)
        x = x - expand_time(hop, x) * velocity
        velocities = velocities + velocity
    return velocities / hops


@dataclass
class ProgressiveDistillation:
    """A `Distiller` of one stage: one step of `student` out of `steps` equals `hops` of the `teacher`.

    Raises ValueError for fewer than 1 step or 2 hops.
    """

    student: nn.Module
    teacher: VelocityModel
    data: Samples
    steps: int
    hops: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.hops < 2:
            raise ValueError(f"steps must be at least 1 and hops at least 2, got {self.steps} and {self.hops}")

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """Pseudo-Huber distance between the student's step and the teacher's, over random pictures and rungs."""
        device = generator.device
        x, condition = self.data.draw(batch_size, generator)
        rung = torch.randint(1, self.steps + 1, (batch_size,), generator=generator, device=device)
        t, r = rung / self.steps, (rung - 1) / self.steps
        x_t = interpolate(x, randn(tuple(x.shape), generator), t)
        error = self.student(x_t, t, condition) - progressive_target(self.teacher, x_t, t, r, condition, self.hops)
        return {"loss": pseudo_huber(error).mean(), "squared_error": error.detach().square().mean()}


def train_progressively(
    teacher: VelocityModel,
    student: nn.Module,
    data: Samples,
    stages: Sequence[int],
    config: TrainConfig,
    out: Path,
    progress: bool = True,
    first_hops: int = 2,
) -> dict[int, TrainResult]:
    """Run the stages, for example (4, 2, 1) steps, each in `out/steps-<n>` with an equal part of the config's budget.

    `student` is where the first stage starts (a copy is trained), `teacher` is guided as the students are to be. The
    results come by number of steps; after an interruption the last one has `finished` False, and calling again goes on.
    Raises ValueError unless each stage has half the steps of the one before.
    """
    if not stages or any(2 * fewer != more for more, fewer in pairwise(stages)):
        raise ValueError(f"stages must halve the steps, for example (4, 2, 1), got {tuple(stages)}")
    part = replace(
        config,
        steps=None if config.steps is None else -(-config.steps // len(stages)),
        minutes=None if config.minutes is None else config.minutes / len(stages),
        decay_fraction=1.0,
    )
    results: dict[int, TrainResult] = {}
    for steps in stages:
        network = copy.deepcopy(student).train().requires_grad_(True)
        stage = ProgressiveDistillation(network, teacher, data, steps, first_hops if not results else 2)
        results[steps] = train(stage, part, out / f"steps-{steps}", progress)
        if not results[steps].finished:
            break
        student = teacher = results[steps].ema.eval()
    return results
