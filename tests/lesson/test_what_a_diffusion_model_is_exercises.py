"""Exercises of lesson 00b: each typical mistake gets its hint, and the answer is that of the package."""

import pytest
import torch

from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided
from diffusion_opt.lesson import checks, solutions
from diffusion_opt.lesson.checks import WrongAnswerError


def noises(x_t, t, points):
    e = (x_t[:, None] - (1 - t) * points) / t
    return e, -e.square().sum(2) / 2


def weighed(weigh, values):
    def answer(x_t, t, points):
        e, exponent = noises(x_t, t, points)
        return (weigh(exponent)[:, :, None] * values(e, points)).sum(1)

    return answer


def soft(exponent):
    return exponent.softmax(1)


MISTAKES = [
    ("ex_00b_1", weighed(soft, lambda e, x: e), r"E\[e \| x_t\]"),
    ("ex_00b_1", weighed(soft, lambda e, x: x + 0 * e), "the clean picture"),
    ("ex_00b_1", weighed(soft, lambda e, x: x - e), "the sign: v"),
    ("ex_00b_1", lambda x_t, t, x: (noises(x_t, t, x)[0] - x).mean(1), "weigh the same"),
    ("ex_00b_1", weighed(torch.exp, lambda e, x: e - x), "add up to 1 for each"),
    ("ex_00b_1", weighed(lambda z: (2 * z).softmax(1), lambda e, x: e - x), "half of the squared"),
    ("ex_00b_1", weighed(lambda z: (-z).softmax(1), lambda e, x: e - x), "sign of the exponent"),
    ("ex_00b_1", weighed(lambda z: z.softmax(0), lambda e, x: e - x), "not over the places"),
    ("ex_00b_1", lambda x_t, t, x: x_t - x, r"all pairs are x_t\[:, None\]"),
    ("ex_00b_2", lambda n, x, t, c, s: n(x, t, c) + s * (n(x, t, c) - n(x, t, c.drop())), "a scale of 1 must"),
    ("ex_00b_2", lambda n, x, t, c, s: n(x, t, c.drop()) + s * (n(x, t, c.drop()) - n(x, t, c)), "the sign"),
    ("ex_00b_2", lambda n, x, t, c, s: n(x, t, c) + s * (n(x, t, c.drop()) - n(x, t, c)), "swapped"),
    ("ex_00b_2", lambda n, x, t, c, s: s * n(x, t, c), "is missing"),
    ("ex_00b_2", lambda n, x, t, c, s: s * (n(x, t, c) - n(x, t, c.drop())), "the difference alone"),
    ("ex_00b_2", lambda n, x, t, c, s: n(x, t, c), "a scale of 1"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_the_expectation_of_a_data_set_is_the_limit_of_narrow_modes():
    points, x_t = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    narrow = GaussianMixtureVelocity(torch.full((4,), 0.25), points, torch.full((4, 2), 1e-4))
    found = solutions.SOLUTIONS["ex_00b_1"](x_t, 0.6, points)
    torch.testing.assert_close(found, narrow(x_t, torch.full((3,), 0.6, dtype=torch.float64)), rtol=1e-4, atol=1e-4)


def test_guidance_is_that_of_the_package():
    ring = GaussianMixtureVelocity.ring(num_modes=4, std=0.3, num_classes=2)
    x, t, classes = (
        torch.randn(3, 2, dtype=torch.float64),
        torch.full((3,), 0.5, dtype=torch.float64),
        ClassCondition(torch.tensor([0, 1, 1]), 2),
    )
    torch.testing.assert_close(
        solutions.SOLUTIONS["ex_00b_2"](ring, x, t, classes, 2.5), Guided(ring, 2.5)(x, t, classes)
    )
