"""Exercises of lesson 02b: each typical mistake gets its hint, and numbers or tensors of one number are both right."""

import pytest
import torch

from diffusion_opt.lesson import checks, solutions
from diffusion_opt.lesson.checks import WrongAnswerError

frechet, covered = (solutions.SOLUTIONS[f"ex_02b_{number}"] for number in (1, 2))


def means(m1, m2):
    return (m1 - m2).square().sum()


def cross(m1, c1, m2, c2):
    return (means(m1, m2) + c1.trace() + c2.trace() - frechet(m1, c1, m2, c2)) / 2


MISTAKES = [
    ("ex_02b_1", lambda m1, c1, m2, c2: means(m1, m2), "covariances are missing"),
    ("ex_02b_1", lambda *a: frechet(*a) - means(a[0], a[2]), "distance of the means is missing"),
    ("ex_02b_1", lambda *a: frechet(*a) - means(a[0], a[2]) + means(a[0], a[2]).sqrt(), "enters squared"),
    ("ex_02b_1", lambda *a: frechet(*a) + cross(*a), "counts twice"),
    ("ex_02b_1", lambda *a: frechet(*a) + 4 * cross(*a), "the sign"),
    (
        "ex_02b_1",
        lambda m, c, n, d: means(m, n) + c.trace() + d.trace() - 2 * (c @ d).clamp(min=0).sqrt().trace(),
        "not the root of each of its numbers",
    ),
    ("ex_02b_1", lambda *a: frechet(*a) + 2 * cross(*a) - 2 * cross(*a) ** 2, "root of each eigenvalue"),
    ("ex_02b_2", lambda p, b, k: covered(p, b, k - 1), r"that point itself: k \+ 1"),
    ("ex_02b_2", lambda p, b, k: covered(b, p, k), "the other way round"),
    ("ex_02b_2", lambda p, b, k: covered(p, b, k) * len(p), "not their share"),
    ("ex_02b_2", lambda p, b, k: 0.123, "off by up to"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_a_tensor_or_a_number_is_right(capsys):
    checks.ex_02b_1(lambda *given: float(frechet(*given)))
    checks.ex_02b_2(lambda *given: torch.tensor(covered(*given)))
    assert capsys.readouterr().out.count("correct: ") == 2
