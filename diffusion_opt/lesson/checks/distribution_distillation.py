"""Exercises of lesson 10."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from diffusion_opt.distillation.distribution import dmd_gradient
from diffusion_opt.distillation.distribution.failures import FAILURES, PlaneRun, run_in_plane
from diffusion_opt.flow import clean_from_velocity
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, is_stub, not_yet, praise

BROKEN = FAILURES["slow_fake_score"]
STEPS = 500


def ex_10_1(answer: Answer) -> None:
    """push(x, x_t, t, v_teacher, v_fake): the gradient of distribution matching on pictures (B, C, H, W)."""
    generator = torch.Generator().manual_seed(2)
    x, x_t, v_teacher, v_fake = torch.randn(4, 3, 1, 2, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    found = called(answer, (x, x_t, t, v_teacher, v_fake))
    if found is None:
        return
    teacher_x, fake_x = (clean_from_velocity(x_t, v, t) for v in (v_teacher, v_fake))
    right, difference, off = dmd_gradient(x, teacher_x, fake_x), fake_x - teacher_x, x - teacher_x

    def over(distance: Tensor) -> Tensor:
        return difference / distance.reshape(-1, 1, 1, 1)

    mistakes = (
        (-right, "the sign: gradient descent goes against it, and pictures must move towards the teacher's"),
        (difference, "the scale is missing: divide by the mean of |x - x_T| of each picture"),
        (right / t.reshape(-1, 1, 1, 1), "the time is missing: the clean prediction is x_t - t v"),
        (over(off.abs().mean()), "each picture has its own scale; this is the mean over the whole batch"),
        (over((x - fake_x).abs().flatten(1).mean(1)), "the scale is the distance to the teacher's prediction x_T"),
        (over(off.square().flatten(1).mean(1)), "the scale is the mean of |x - x_T|, not of its square"),
        (over(off.flatten(1).norm(dim=1)), "the scale is the mean of |x - x_T|, not the length of the vector"),
        (over(off.abs().flatten(1).sum(1)), "the scale is the mean over a picture's numbers, not their sum"),
        (difference / off.abs().clamp(min=1e-6), "one scale for each picture, not one for each pixel"),
        (over((x - x_t).abs().flatten(1).mean(1)), "the scale compares x with the clean prediction x_T, not with x_t"),
    )
    compare(found, right, mistakes)
    praise(answer, "the student needs no gradient of either network: two passes without memory, and one subtraction")


def ex_10_3(answer: Answer) -> None:
    """weight_of(f, r): h(r) = f''(r) r^2 for a function f of a number, at ratios r (B,)."""
    r = torch.tensor([0.2, 0.7, 1.0, 3.0, 8.0], dtype=torch.float64)
    found = called(answer, (_jeffreys, r))
    if found is None:
        return
    first, second = r.log() + 1 - 1 / r, 1 / r + 1 / r**2
    mistakes = (
        (second, "this is f''; the factor r^2 is missing"),
        (second * r, "f'' times r: one factor r is missing, h(r) = f''(r) r^2"),
        (first * r**2, "this has the first derivative of f; h needs the second"),
        (first * r, "this has the first derivative of f and one factor r; h(r) = f''(r) r^2"),
        (first, "this is f'; h(r) = f''(r) r^2"),
        (_jeffreys(r) * r**2, "this has f itself; h needs its second derivative"),
        (second * r**2 / (second * r**2).mean(), "right up to scale; h itself is asked for, not scaled to mean 1"),
    )
    compare(found, second * r**2, mistakes)
    praise(answer, "any convex f gives a divergence, and all of them have one gradient, up to this weight")


def ex_10_2(answer: PlaneRun | EllipsisType | None) -> None:
    """repaired: the run "slow_fake_score" with one field changed so that the student finds all eight modes."""
    if is_stub(answer):
        not_yet()
        return
    if not isinstance(answer, PlaneRun):
        raise WrongAnswerError(f"a PlaneRun is asked for, got {type(answer).__name__}")
    before, after = asdict(BROKEN), asdict(answer)
    changed = [name for name in after if after[name] != before[name]]
    if len(changed) != 1:
        what = "nothing" if not changed else ", ".join(changed)
        raise WrongAnswerError(f"change one field of {BROKEN}; you changed {what}")
    if changed[0] in ("guidance", "t_min", "t_max"):
        raise WrongAnswerError(f"{changed[0]} is as in the sound run; look at what trains the fake score")
    with tempfile.TemporaryDirectory() as folder:
        result = run_in_plane(answer, Path(folder), steps=STEPS)
    if result.modes < 8:
        raise WrongAnswerError(f"{result.modes} of 8 modes after {STEPS} steps. {HINTS[changed[0]](answer)}")
    praise(answer, "what counts is how far the fake score falls behind the student, and the cheapest cure is its rate")


def _jeffreys(r: Tensor) -> Tensor:
    return (r - 1) * r.log()


HINTS: dict[str, Callable[[PlaneRun], str]] = {
    "fake_updates": lambda run: (
        f"{run.fake_updates} updates for one, each at a twentieth of the student's rate, are still "
        f"{run.fake_updates * run.fake_rate:g} to 1, and they cost the student its turns"
        if run.fake_updates
        else "without updates the fake score knows only the student of the first step"
    ),
    "warmup": lambda run: f"after {run.warmup} steps of warm-up it knows the student, and loses sight of it again",
    "fake_rate": lambda run: f"at {run.fake_rate:g} of the student's rate the fake score does not keep up well enough",
}
