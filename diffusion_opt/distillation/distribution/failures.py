"""How distribution matching fails, in seconds: a ring of eight modes in the plane, two classes, a student from scratch.

The teacher is exact, so whatever goes wrong is the method's. `FAILURES` names the settings, the sound one first:

    sound               fake score warmed up, four updates for each of the student, twice its rate    all eight modes
    one_update          one update for one                                                            all eight modes
    slow_fake_score     one update for one, no warm-up, a twentieth of the student's rate             most are lost
    frozen_fake_score   no updates after the warm-up                                                  none
    little_noise        compared at noise levels up to 0.15 only                                      some are missed
    strong_guidance     the teacher guided with scale 6                                               half are dropped

The fake score decides almost everything: it has to know the student as it is now. Where it lags, the gradient goes on
pushing points away from where they were, and they run together into a few modes or out of all of them; `lag` above 1
tells (`alarms.py`). In the plane a small network learns so fast that one update for one will still do; what counts is
how far the fake score falls behind, and larger networks on images fall behind sooner. The comparison also needs every
noise level: with little noise points see the slope of the mode they are in, and nothing of those they have missed. And
guidance that is too strong is matched faithfully: it empties the modes that lie next to the other class.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.distillation.distribution.alarms import Alarms
from diffusion_opt.distillation.distribution.dmd import DistributionMatching
from diffusion_opt.distillation.distribution.rollout import jump
from diffusion_opt.evaluation.modes import modes_covered, stray_share
from diffusion_opt.flow import GaussianMixtureVelocity, Guided, randn
from diffusion_opt.models import PointVelocity
from diffusion_opt.subjects import Classes
from diffusion_opt.training import TrainConfig, train


@dataclass(frozen=True, slots=True)
class PlaneRun:
    """Settings of one run: the scale of guidance, and fields of `DistributionMatching`."""

    guidance: float = 1.0
    fake_updates: int = 4
    warmup: int = 100
    fake_rate: float = 2.0
    t_min: float = 0.02
    t_max: float = 0.98


FAILURES: dict[str, PlaneRun] = {
    "sound": PlaneRun(),
    "one_update": PlaneRun(fake_updates=1),
    "slow_fake_score": PlaneRun(fake_updates=1, warmup=0, fake_rate=0.05),
    "frozen_fake_score": PlaneRun(fake_updates=0),
    "little_noise": PlaneRun(t_max=0.15),
    "strong_guidance": PlaneRun(guidance=6.0),
}


@dataclass(frozen=True, slots=True, eq=False)
class PlaneResult:
    """What a run left: points of the student, the modes they cover, the share near none, the log, the first alarm."""

    points: Float[Tensor, "n 2"]
    modes: int
    stray: float
    history: list[dict]
    alarm: str | None


def ring() -> GaussianMixtureVelocity:
    """The teacher: eight modes, the upper half of the ring one class, the lower the other."""
    return replace(GaussianMixtureVelocity.ring(num_modes=8, radius=3.0, std=0.3), classes=torch.arange(8) // 4)


def run_in_plane(
    settings: PlaneRun, out: Path, steps: int = 1000, seed: int = 0, num_points: int = 4000, progress: bool = False
) -> PlaneResult:
    """Train a student of the ring from scratch in `out` and look at it; seconds on one core.

    The run goes on where an alarm would end it; `alarm` is what it would have said.
    """
    teacher = ring()
    student, fake_score = (PointVelocity(num_classes=2, seed=seed + i) for i in (0, 1))
    method = DistributionMatching(
        student=student,
        fake_score=fake_score,
        teacher=teacher if settings.guidance == 1 else Guided(teacher, settings.guidance),
        sample_shape=(2,),
        conditions=Classes(2),
        fake_updates=settings.fake_updates,
        warmup=settings.warmup,
        fake_rate=settings.fake_rate,
        t_min=settings.t_min,
        t_max=settings.t_max,
        alarms=Alarms(max_lag=None),
    )
    config = TrainConfig(steps=steps, batch_size=128, learning_rate=2e-3, ema_decay=0.98, betas=(0.0, 0.99), seed=seed)
    result = train(method, config, out, progress)
    noise, ones = randn((num_points, 2), torch.Generator().manual_seed(seed + 1)), torch.ones(num_points)
    condition = method.conditions[torch.arange(num_points) % 2]
    with torch.no_grad():
        points = jump(result.ema, noise, ones, torch.zeros_like(ones), condition)
    raised = [said for row in result.history if (said := Alarms(after=steps // 10).check(row["step"], row))]
    modes, stray = modes_covered(points, teacher), stray_share(points, teacher)
    return PlaneResult(points, modes, stray, result.history, raised[0] if raised else None)
