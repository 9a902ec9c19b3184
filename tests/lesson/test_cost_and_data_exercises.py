"""Exercises of lesson 11: each typical mistake gets its hint, and other ways to the right answer pass."""

import math

import numpy as np
import pytest
import torch

from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError


def in_logs(seconds, distances, at, which=slice(None)):
    slope, start = np.polyfit(np.log(seconds)[which], np.log(distances)[which], 1)
    return float(np.exp(start + slope * np.log(at)))


MISTAKES = [
    ("ex_11_1", lambda teacher, updates: 2 + teacher + 2 * updates, "backward passes are missing"),
    ("ex_11_1", lambda teacher, updates: 4 + teacher, "has its turns, and they cost too"),
    ("ex_11_1", lambda teacher, updates: 8 + teacher, "fake_updates turns for one"),
    ("ex_11_1", lambda teacher, updates: 4 + teacher + 4 * (updates + 1), "not one more"),
    ("ex_11_1", lambda teacher, updates: 4 + teacher + (4 + teacher) * updates, "the teacher rests"),
    ("ex_11_1", lambda teacher, updates: 4 + teacher + 6 * updates, "only makes pictures"),
    ("ex_11_1", lambda teacher, updates: 4 + teacher + 3 * updates, "student's pass is missing there"),
    ("ex_11_1", lambda teacher, updates: 3 + teacher + 4 * updates, "is asked too"),
    ("ex_11_1", lambda teacher, updates: 6 + teacher + 4 * updates, "no gradient flows through the fake score"),
    ("ex_11_1", lambda teacher, updates: 4 + 2 * teacher + 4 * updates, "both passes of guidance already"),
    ("ex_11_1", lambda teacher, updates: (4 + teacher + 4 * updates) / (updates + 1), "not the mean turn"),
    ("ex_11_1", lambda *_: 100, "expected 33 .* got 100"),
    ("ex_11_2", lambda x, y, at: float(np.polyval(np.polyfit(x, y, 1), at)), "without logarithms"),
    (
        "ex_11_2",
        lambda x, y, at: float(np.exp(np.polyval(np.polyfit(x, np.log(y), 1), at))),
        "logarithm of the seconds is missing",
    ),
    (
        "ex_11_2",
        lambda x, y, at: float(np.polyval(np.polyfit(np.log(x), y, 1), np.log(at))),
        "logarithm of the distance is missing",
    ),
    ("ex_11_2", lambda *points: math.log(in_logs(*points)), "still the logarithm"),
    ("ex_11_2", lambda *points: in_logs(*points, slice(-2, None)), "last two points alone"),
    ("ex_11_2", lambda *points: in_logs(*points, [0, -1]), "first and last point alone"),
    ("ex_11_2", lambda x, y, at: y[-1] * at / x[-1], "in proportion"),
    ("ex_11_2", lambda x, y, at: y[-1] * x[-1] / at, "slope of -1"),
    ("ex_11_2", lambda x, y, at: y[-1], "the last point again"),
    ("ex_11_2", lambda *_: 2.0, "off by up to"),
    ("ex_11_3", lambda training, teacher, student: training / teacher, "are not free"),
    ("ex_11_3", lambda training, teacher, student: math.ceil(training / teacher), "are not free"),
    ("ex_11_3", lambda training, teacher, student: training / student, "in the training's time"),
    ("ex_11_3", lambda training, teacher, student: training * (teacher - student), "divide by what a picture saves"),
    ("ex_11_3", lambda training, teacher, student: training / (teacher - student), "come whole"),
    ("ex_11_3", lambda training, teacher, student: int(training / (teacher - student)), "not quite paid"),
    ("ex_11_3", lambda training, teacher, student: training / (student - teacher), "the sign"),
    ("ex_11_3", lambda training, teacher, student: math.ceil(training / (student - teacher)), "the sign"),
    ("ex_11_3", lambda training, teacher, student: math.ceil(training / (teacher - student)), "never pays"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "right", [in_logs, lambda *points: torch.tensor([in_logs(*points)]), lambda *points: np.float64(in_logs(*points))]
)
def test_a_power_law_may_be_fitted_by_any_means(right, capsys):
    checks.ex_11_2(right)
    assert capsys.readouterr().out.startswith("correct: ")
