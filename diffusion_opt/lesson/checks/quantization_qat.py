"""Exercises of lesson 04."""

import torch
from torch import Tensor

from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


@torch.enable_grad()
def ex_04_1(answer: Answer) -> None:
    """clipped_rounding(x, amax, bits): a grid with a fixed range; the gradient is 1 inside of it and 0 outside."""
    x = 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    amax, bits = 1.5, 4
    leaf = x.clone().requires_grad_()
    found = called(answer, (leaf, amax, bits))
    if found is None:
        return
    top = 2 ** (bits - 1) - 1
    inside = x.clamp(-amax, amax)
    expected = (inside * top / amax).round() * amax / top
    mistakes = (
        (inside, "these are the clamped numbers: they are not on the grid yet"),
        (x, "these are the numbers as they were: nothing is rounded yet"),
        (
            (x * top / amax).round() * amax / top,
            "numbers beyond the range must be cut off: nothing is larger than amax",
        ),
        (expected * top / amax, "these are the integers; divide by s, so they stand for numbers"),
        ((inside * (top + 1) / amax).round() * amax / (top + 1), "the top code is 2^(bits - 1) - 1"),
    )
    compare(found.detach() if isinstance(found, Tensor) else found, expected, mistakes)
    if not found.requires_grad:
        raise WrongAnswerError(
            "the numbers are right, but detach() took the whole gradient: only the rounding needs it"
        )
    (slope,) = torch.autograd.grad(found.sum(), leaf, allow_unused=True, materialize_grads=True)
    flat = "the numbers are right, but their gradient is zero everywhere: round() has none, so detach what it adds"
    through = "the gradient is 1 beyond the range too: build on the clamped x, clamp() has the right gradient"
    compare(slope, (x.abs() <= amax).float(), ((torch.zeros_like(x), flat), (torch.ones_like(x), through)))
    praise(answer, "where a number is cut off no small move helps, and the weight behind it gets told so")


@torch.enable_grad()
def ex_04_2(answer: Answer) -> None:
    """distillation_loss(student, teacher, x): relative squared error of the batch, a gradient for the student alone."""
    generator = torch.Generator().manual_seed(2)
    x, ours, theirs = (torch.randn(*shape, generator=generator) for shape in ((5, 3), (3, 4), (3, 4)))
    x[0] *= 5  # samples of different sizes: a mean of ratios is another number
    ours, theirs = ours.requires_grad_(), theirs.requires_grad_()
    found = called(answer, (lambda z: z @ ours, lambda z: z @ theirs, x))
    if found is None:
        return
    if not isinstance(found, Tensor):
        raise WrongAnswerError(f"a tensor is asked for, so that it has a gradient; got {type(found).__name__}")
    v, target = (x @ ours).detach(), (x @ theirs).detach()
    wrong = (v - target).square()
    loss = wrong.sum() / target.square().sum()
    mistakes = (
        (wrong.mean(), "this is the mean square alone: divide by that of the teacher, so that it is relative"),
        (wrong.sum(), "this is the sum of squares alone: divide by that of the teacher, so that it is relative"),
        (loss.sqrt(), "this is the relative error; the loss is its square, which has a gradient at 0 too"),
        (wrong.sum() / v.square().sum(), "relative to the teacher: what is divided by must not learn"),
        ((wrong.sum(1) / target.square().sum(1)).mean(), "one ratio for the batch, not the mean of ratios of samples"),
        (wrong.mean() / target.square().sum(), "a mean over a sum: take the same of both"),
    )
    compare(found.detach(), loss, mistakes)
    slopes = torch.autograd.grad(found, (ours, theirs), allow_unused=True) if found.requires_grad else (None, None)
    if slopes[0] is None:
        raise WrongAnswerError("the value is right, but the student gets no gradient: keep student(x) out of no_grad()")
    if slopes[1] is not None:
        raise WrongAnswerError("the value is right, but the teacher gets a gradient too: put teacher(x) into no_grad()")
    praise(
        answer,
        "no pictures and no noise target: the float network says at each point what the quantized one should give",
    )


def ex_04_3(answer: Answer) -> None:
    """two_in_a_byte(codes): INT4 codes of two neighbors in one byte, the even column in the low half."""
    codes = torch.randint(-8, 8, (5, 6), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    codes[0, :4] = torch.tensor([-8, 7, -1, 0])
    given = codes.clone()
    found = called(answer, (given,))
    if found is None:
        return
    if not torch.equal(given, codes):
        raise WrongAnswerError("the argument has changed: make a new tensor")
    half = codes.view(torch.uint8) & 15
    shape = (codes.shape[0], codes.shape[1] // 2)
    if isinstance(found, Tensor) and found.shape == shape and found.dtype != torch.uint8:
        raise WrongAnswerError(
            f"bytes are asked for, torch.uint8, got {found.dtype}: start from codes.view(torch.uint8)"
        )
    shifted = (codes + 8).view(torch.uint8)
    signed = codes.view(torch.uint8)
    mistakes = (
        (half[:, 1::2] | half[:, ::2] << 4, "the halves are swapped: the even column goes into the low one"),
        (
            signed[:, ::2] | signed[:, 1::2] << 4,
            "a negative code fills all eight bits: cut the even one to four with & 15",
        ),
        (shifted[:, ::2] | shifted[:, 1::2] << 4, "two's complement is asked for: keep the bits, do not add 8"),
        (
            half[:, : shape[1]] | half[:, shape[1] :] << 4,
            "these pair the left half of a row with the right; neighbors are asked for",
        ),
        (half[:, ::2], "only the even columns are in: the odd ones go into the high half, << 4"),
    )
    compare(found, half[:, ::2] | half[:, 1::2] << 4, mistakes)
    praise(answer, "4 bits per code; with a float32 scale for 64 of them a weight costs 4.5")
