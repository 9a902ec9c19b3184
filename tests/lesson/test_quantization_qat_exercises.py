"""Exercises of lesson 04: each typical mistake gets its hint, and the solutions are what the package computes."""

import pytest
import torch

from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.solutions.quantization_qat import clipped_rounding, distillation_loss, two_in_a_byte
from diffusion_opt.quantization import FORMATS
from diffusion_opt.quantization.arithmetic.int8 import int8
from diffusion_opt.quantization.packed.encoding import encode


def rounded(x, amax, bits, top=lambda bits: 2 ** (bits - 1) - 1):
    s = top(bits) / amax
    return (x.clamp(-amax, amax) * s).round() / s


def loss(ratio):
    """A wrong `distillation_loss`: another ratio of the two velocities."""

    def answer(student, teacher, x):
        with torch.no_grad():
            target = teacher(x)
        return ratio(student(x), target)

    return answer


def both_learn(student, teacher, x):
    return (student(x) - teacher(x)).square().sum() / teacher(x).square().sum()


def nobody_learns(student, teacher, x):
    with torch.no_grad():
        return both_learn(student, teacher, x)


def pairs(even, odd):
    """A wrong `two_in_a_byte`, from what goes into the low and the high half."""
    return lambda codes: even(codes) | odd(codes) << 4


def halves(codes):
    return codes.view(torch.uint8) & 15


def in_place(codes):
    codes &= 15
    return codes[:, ::2].view(torch.uint8)


MISTAKES = [
    ("ex_04_1", lambda x, amax, bits: x, "nothing is rounded yet"),
    ("ex_04_1", lambda x, amax, bits: x.clamp(-amax, amax), "not on the grid yet"),
    ("ex_04_1", lambda x, amax, bits: (x * 7 / amax).round() * amax / 7, "must be cut off"),
    ("ex_04_1", lambda x, amax, bits: rounded(x, amax, bits) * 7 / amax, "these are the integers"),
    ("ex_04_1", lambda x, amax, bits: rounded(x, amax, bits, lambda bits: 2 ** (bits - 1)), r"2\^\(bits - 1\) - 1"),
    ("ex_04_1", lambda x, amax, bits: rounded(x, amax, bits).detach(), "took the whole gradient"),
    ("ex_04_1", rounded, "gradient is zero everywhere"),
    ("ex_04_1", lambda x, amax, bits: x + (rounded(x, amax, bits) - x).detach(), "1 beyond the range too"),
    ("ex_04_1", lambda x, amax, bits: 0 * x, "off by up to"),
    ("ex_04_2", loss(lambda v, target: (v - target).square().mean()), "mean square alone"),
    ("ex_04_2", loss(lambda v, target: (v - target).square().sum()), "sum of squares alone"),
    ("ex_04_2", loss(lambda v, target: (v - target).norm() / target.norm()), "the loss is its square"),
    ("ex_04_2", loss(lambda v, target: (v - target).square().sum() / v.square().sum()), "relative to the teacher"),
    (
        "ex_04_2",
        loss(lambda v, target: ((v - target).square().sum(1) / target.square().sum(1)).mean()),
        "one ratio for the batch",
    ),
    ("ex_04_2", loss(lambda v, target: (v - target).square().mean() / target.square().sum()), "a mean over a sum"),
    ("ex_04_2", both_learn, "teacher gets a gradient"),
    ("ex_04_2", nobody_learns, "student gets no gradient"),
    ("ex_04_3", pairs(lambda c: halves(c)[:, 1::2], lambda c: halves(c)[:, ::2]), "halves are swapped"),
    (
        "ex_04_3",
        pairs(lambda c: c.view(torch.uint8)[:, ::2], lambda c: c.view(torch.uint8)[:, 1::2]),
        "negative code fills all eight bits",
    ),
    (
        "ex_04_3",
        pairs(lambda c: (c + 8).view(torch.uint8)[:, ::2], lambda c: (c + 8).view(torch.uint8)[:, 1::2]),
        "two's complement is asked for",
    ),
    ("ex_04_3", pairs(lambda c: halves(c)[:, :3], lambda c: halves(c)[:, 3:]), "neighbors are asked for"),
    ("ex_04_3", lambda codes: halves(codes)[:, ::2], "only the even columns"),
    ("ex_04_3", lambda codes: two_in_a_byte(codes).int(), "bytes are asked for"),
    ("ex_04_3", in_place, "argument has changed"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("name", "wrong", "hint"),
    [
        ("ex_04_1", lambda x, amax, bits: 3.0, "a tensor of shape"),
        ("ex_04_2", lambda student, teacher, x: 3.0, "a tensor is asked for"),
        ("ex_04_3", lambda codes: halves(codes), "the shape must be"),
    ],
)
def test_something_else_than_asked_for_is_explained(name, wrong, hint):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)


def test_checks_need_no_gradient_switched_on_around_them(capsys):
    with torch.no_grad():
        checks.ex_04_1(clipped_rounding)
        checks.ex_04_2(distillation_loss)
    assert capsys.readouterr().out.count("correct: ") == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_the_rounding_is_the_one_of_the_package(bits):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[0] = 0.7  # the range itself; beyond it the package's grid has one number more below, -2^(bits - 1)
    inside = x.clamp(-0.7, 0.7)
    torch.testing.assert_close(clipped_rounding(x, 0.7, bits), int8(inside, torch.tensor(0.7), bits))


def test_the_bytes_are_those_of_the_package():
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    amax = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    codes = (weight.unflatten(1, (-1, 64)) * (torch.tensor(7.0) / amax)[..., None]).round().flatten(1).to(torch.int8)
    assert torch.equal(two_in_a_byte(codes), encode(weight, FORMATS["w4a4"].weight, amax).codes)
