"""Exercises of lesson 09: each typical mistake gets its hint, and what may be answered otherwise may be."""

import pytest
import torch

from diffusion_opt.distillation.trajectory.failures import FAILURES
from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.checks.trajectory_distillation import CAUSES


def target(hop_end=lambda x, hop, v: x - hop * v, at=lambda t, s, r: (s, r), mix=None):
    """A target with one part of it made otherwise."""

    def made(x, t, s, r, v, jump):
        with torch.no_grad():
            hop, rest = (t - s)[:, None], (s - r)[:, None]
            then = jump(hop_end(x, hop, v), *at(t, s, r))
            return (hop * v + rest * then) / (t - r)[:, None] if mix is None else mix(hop, rest, v, then, t, r)

    return made


def with_gradient(x, t, s, r, v, jump):
    hop, rest = (t - s)[:, None], (s - r)[:, None]
    return (hop * v + rest * jump(x - hop * v, s, r)) / (hop + rest)


MISTAKES = [
    ("ex_09_1", lambda weights, means: means.mean(0), "counts by its weight"),
    ("ex_09_1", lambda weights, means: torch.zeros(2), "mean of the noise"),
    ("ex_09_1", lambda weights, means: means[weights.argmax()], "heaviest mode"),
    ("ex_09_1", lambda weights, means: -weights @ means, "the sign"),
    ("ex_09_1", lambda weights, means: weights[:, None] * means, "add up over the modes"),
    ("ex_09_1", lambda weights, means: 3.0, "a tensor of shape"),
    ("ex_09_2", target(hop_end=lambda x, hop, v: x), "begins where the hop ends"),
    ("ex_09_2", target(hop_end=lambda x, hop, v: x + hop * v), "the wrong way"),
    ("ex_09_2", target(at=lambda t, s, r: (t, r)), "the time is s, not t"),
    ("ex_09_2", target(at=lambda t, s, r: (s, 0 * r)), "ends at r, not at 0"),
    ("ex_09_2", target(at=lambda t, s, r: (s, t)), "t lies behind it"),
    ("ex_09_2", target(mix=lambda hop, rest, v, u, t, r: hop * v + rest * u), "the way itself"),
    ("ex_09_2", target(mix=lambda hop, rest, v, u, t, r: (hop * v + rest * u) / t[:, None]), "right for r = 0 alone"),
    ("ex_09_2", target(mix=lambda hop, rest, v, u, t, r: (rest * v + hop * u) / (hop + rest)), "swapped"),
    ("ex_09_2", target(mix=lambda hop, rest, v, u, t, r: (v + u) / 2), "half and half"),
    ("ex_09_2", target(mix=lambda hop, rest, v, u, t, r: u), "the hop counts as well"),
    ("ex_09_2", target(mix=lambda hop, rest, v, u, t, r: v), "off by up to"),
    ("ex_09_2", with_gradient, "no_grad"),
    ("ex_09_3", {**CAUSES, "A": "coarse_hop"}, "A is something else: its loss is almost zero"),
    ("ex_09_3", {**CAUSES, "B": "frozen_hop"}, "B is something else: with four jumps"),
    ("ex_09_3", {**CAUSES, "C": "starved_end"}, "C is something else"),
    ("ex_09_3", {**CAUSES, "C": "bad_luck"}, "'bad_luck' is no entry of FAILURES"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("wrong", ["frozen_hop", {"A": "frozen_hop"}, ["frozen_hop", "starved_end", "coarse_hop"]])
def test_a_diagnosis_of_another_form_is_explained(wrong):
    with pytest.raises(WrongAnswerError, match="the keys A, B and C"):
        checks.ex_09_3(wrong)


def test_an_open_diagnosis_is_no_mistake(capsys):
    checks.ex_09_3({"A": "frozen_hop", "B": ..., "C": ...})
    assert capsys.readouterr().out == "not yet\n"


def test_the_mean_may_come_in_single_precision(capsys):
    checks.ex_09_1(lambda weights, means: (weights.float()[:, None] * means.float()).sum(0))
    assert capsys.readouterr().out.startswith("correct: ")


def test_the_sick_students_are_of_the_gallery():
    assert set(CAUSES.values()) <= set(FAILURES)
