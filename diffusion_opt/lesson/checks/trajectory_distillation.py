"""Exercises of lesson 09."""

from collections.abc import Callable, Mapping
from types import EllipsisType

import torch
from torch import Tensor

from diffusion_opt.distillation.trajectory.failures import FAILURES
from diffusion_opt.distillation.trajectory.flow_map import hop_target
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, is_stub, not_yet, praise

CAUSES = {"A": "frozen_hop", "B": "starved_end", "C": "coarse_hop"}
FAILED_STUDENTS = {name: FAILURES[cause] for name, cause in CAUSES.items()}
_SIGNS = {
    "A": "its loss is almost zero from the first step, and yet its points are far off: what can it learn from?",
    "B": "with four jumps it is right, with one it is not: which jump is it that it does not know?",
    "C": "its one pass looks like two Euler steps of the teacher, in the figure further up: what did its target teach?",
}


def ex_09_1(answer: Answer) -> None:
    """landing(weights, means): where one Euler step over the whole time takes every point of noise."""
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    means = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.25, -4.0]], dtype=torch.float64)
    found = called(answer, (weights, means))
    if found is None:
        return
    mean = weights @ means
    mistakes = (
        (means.mean(0), "each mode counts by its weight: this is the mean of the modes, not of the data"),
        (torch.zeros(2, dtype=torch.float64), "0 is the mean of the noise; the step ends at the mean of the data"),
        (means[weights.argmax()], "not the heaviest mode: at t = 1 the noise says nothing about where a point belongs"),
        (-mean, "the sign: the step goes from x along -v, and v = x - E[data]"),
    )
    if isinstance(found, Tensor) and found.shape == mean.shape:
        found = found.to(mean.dtype)
    elif isinstance(found, Tensor) and found.shape == means.shape:
        raise WrongAnswerError("one point is asked for, the same for all noise: add up over the modes")
    compare(found, mean, mistakes)
    praise(answer, "every noise ends at the mean of the data: one straight step knows no picture, only their average")


def ex_09_2(answer: Answer) -> None:
    """jump_target(x_t, t, s, r, v, jump): the target u* of the jump t -> r, without gradient."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    times = torch.rand(3, 7, generator=generator, dtype=torch.float64).sort(dim=0, descending=True).values
    t, s, r = times * torch.tensor([[1.0], [0.9], [0.8]], dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return scale * (x.sin() + (t * t)[:, None] - 2 * r[:, None] * x)

    found = called(answer, (x, t, s, r, v, jump))
    if found is None:
        return
    with torch.no_grad():
        mistakes = _target_mistakes(x, t, s, r, v, jump)
    compare(found.detach() if isinstance(found, Tensor) else found, hop_target(x, t, s, r, v, jump), mistakes)
    if found.requires_grad:
        raise WrongAnswerError(
            "the values are right, but gradient flows into the target: the network would learn to move its own goal; "
            "compute it under torch.no_grad()"
        )
    praise(
        answer, "with r = 0 it is consistency distillation, with s halfway and its own hop shortcut, and in between all"
    )


def ex_09_3(answer: Mapping[str, str | EllipsisType] | EllipsisType | None) -> None:
    """diagnosis: which wrong setting each of the students A, B and C was trained with."""
    if is_stub(answer) or (isinstance(answer, Mapping) and any(is_stub(cause) for cause in answer.values())):
        not_yet()
        return
    if not isinstance(answer, Mapping) or set(answer) != set(CAUSES):
        raise WrongAnswerError(f"a dict with the keys A, B and C is asked for, got {answer!r}")
    if unknown := [cause for cause in answer.values() if cause not in FAILURES]:
        raise WrongAnswerError(f"{unknown[0]!r} is no entry of FAILURES; there are {', '.join(FAILURES)}")
    for name, cause in CAUSES.items():
        if answer[name] != cause:
            raise WrongAnswerError(f"{name} is something else: {_SIGNS[name]}")
    praise(answer, "look at one step and at four, and at the loss; the loss alone would have called A the best student")


def _target_mistakes(
    x: Tensor, t: Tensor, s: Tensor, r: Tensor, v: Tensor, jump: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[tuple[Tensor, str]]:
    """What typical slips give, each with its hint."""
    hop, rest, whole = (time[:, None] for time in (t - s, s - r, t - r))
    x_s, zero = x - hop * v, torch.zeros_like(r)
    return [
        ((hop * v + rest * jump(x, s, r)) / whole, "the rest of the way begins where the hop ends: at x_s, not at x_t"),
        ((hop * v + rest * jump(x + hop * v, s, r)) / whole, "the hop goes the wrong way: x_s = x_t - (t - s) v"),
        ((hop * v + rest * jump(x_s, t, r)) / whole, "at x_s the time is s, not t"),
        ((hop * v + rest * jump(x_s, s, zero)) / whole, "the rest of the way ends at r, not at 0"),
        ((hop * v + rest * jump(x_s, s, t)) / whole, "the rest of the way goes from s to r; t lies behind it"),
        (hop * v + rest * jump(x_s, s, r), "this is the way itself; a velocity is the way divided by its time, t - r"),
        (
            (hop * v + rest * jump(x_s, s, r)) / t[:, None],
            "divided by t: right for r = 0 alone; the whole way takes t - r",
        ),
        ((rest * v + hop * jump(x_s, s, r)) / whole, "the weights are swapped: v rules over the hop, t - s"),
        ((v + jump(x_s, s, r)) / 2, "half and half is right if s is halfway; else each counts by its time"),
        (jump(x_s, s, r), "the hop counts as well: mix v with it, each by its time"),
    ]
