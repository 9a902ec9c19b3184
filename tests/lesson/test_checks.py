"""Exercise checks: the solution passes, a stub gets "not yet", each typical mistake its own hint."""

from inspect import isfunction
from itertools import pairwise

import pytest
import torch

from diffusion_opt.flow import adams_bashforth2, euler, heun
from diffusion_opt.lesson import checks, solutions
from diffusion_opt.lesson.checks import WrongAnswerError

EXERCISES = sorted(solutions.SOLUTIONS)


def raising_stub(*_):
    raise NotImplementedError("write me")


def by_steps(step):
    """A solver from a function (model, x, t, r) -> slope."""

    def solve(model, x, times):
        for t, r in pairwise(times.tolist()):
            x = x + (r - t) * step(model, x, t, r)
        return x

    return solve


def at(model, x, t):
    return model(x, torch.full((len(x),), t, dtype=x.dtype))


def even_steps_only(model, x, times):
    previous = None
    for t, r in pairwise(times.tolist()):
        v = at(model, x, t)
        x = x + (r - t) * (v if previous is None else 1.5 * v - 0.5 * previous)
        previous = v
    return x


def forgetful(model, x, times):
    """Right result, but the velocity of the step before is computed again."""
    previous = None
    for t, r in pairwise(times.tolist()):
        v, h = at(model, x, t), r - t
        slope = v if previous is None else v + h / (2 * previous[1]) * (v - at(model, *previous[0]))
        previous, x = ((x, t), h), x + h * slope
    return x


def two_step(factor):
    def solve(model, x, times):
        previous = None
        for t, r in pairwise(times.tolist()):
            v, h = at(model, x, t), r - t
            x = x + h * (v if previous is None else v + factor(h, previous[1]) * (v - previous[0]))
            previous = v, h
        return x

    return solve


MISTAKES = [
    ("ex_00_1", lambda x_t, v, t: x_t + t.reshape(-1, 1, 1, 1) * v, "the sign"),
    ("ex_00_1", lambda x_t, v, t: x_t - v, "the time is missing"),
    ("ex_00_1", lambda x_t, v, t: x_t - (1 - t.reshape(-1, 1, 1, 1)) * v, "swapped"),
    ("ex_00_1", lambda x_t, v, t: x_t + (1 - t.reshape(-1, 1, 1, 1)) * v, "this is the noise"),
    ("ex_00_1", lambda x_t, v, t: x_t - t * v, r"reshape it to \(B, 1, 1, 1\)"),
    ("ex_00_1", lambda x_t, v, t: (x_t - t.reshape(-1, 1, 1, 1) * v).mean(1), "the shape must be"),
    ("ex_00_1", lambda x_t, v, t: 2.0, "a tensor of shape .* got float"),
    ("ex_00_1", lambda x_t, v, t: x_t * 0, "off by up to"),
    ("ex_01_1", lambda n, d: 2 * n * n * d, "projections are missing"),
    ("ex_01_1", lambda n, d: 4 * n * d * d, "attention itself is missing"),
    ("ex_01_1", lambda n, d: 3 * n * d * d + 2 * n * n * d, "output projection is missing"),
    ("ex_01_1", lambda n, d: 4 * n * d * d + n * n * d, "second product"),
    ("ex_01_1", lambda n, d: 8 * n * d * d + 4 * n * n * d, "FLOPs"),
    ("ex_01_1", lambda n, d: 17, "got 17"),
    ("ex_01_2", lambda p, s: (1 - p) + p / s, "the new time"),
    ("ex_01_2", lambda p, s: s, "only a share"),
    ("ex_01_2", lambda p, s: 1 / (1 - p), "endless factor"),
    ("ex_01_2", lambda p, s: p * s + (1 - p), "do not average"),
    ("ex_02_1", euler, "this is Euler"),
    ("ex_02_1", by_steps(lambda m, x, t, r: at(m, x + (r - t) * at(m, x, t), r)), "only the velocity at the end"),
    ("ex_02_1", by_steps(lambda m, x, t, r: (at(m, x, t) + at(m, x, r)) / 2), "at the old point"),
    ("ex_02_1", by_steps(lambda m, x, t, r: (at(m, x, t) + at(m, x + (r - t) * at(m, x, t), t)) / 2), "at time t"),
    ("ex_02_1", by_steps(lambda m, x, t, r: (at(m, x, t) + at(m, x - (r - t) * at(m, x, t), r)) / 2), "wrong way"),
    ("ex_02_1", by_steps(lambda m, x, t, r: at(m, x, t) + at(m, x + (r - t) * at(m, x, t), r)), "twice too far"),
    ("ex_02_1", by_steps(lambda m, x, t, r: at(m, x + (r - t) / 2 * at(m, x, t), (t + r) / 2)), "midpoint"),
    ("ex_02_1", adams_bashforth2, "off by up to"),
    ("ex_02_2", euler, "this is Euler"),
    ("ex_02_2", two_step(lambda h, h_old: -h / (2 * h_old)), "the sign"),
    ("ex_02_2", even_steps_only, "right for equal steps only"),
    ("ex_02_2", two_step(lambda h, h_old: h_old / (2 * h)), "the steps are swapped"),
    ("ex_02_2", two_step(lambda h, h_old: h / h_old), "a 2 is missing"),
    ("ex_02_2", forgetful, "9 evaluations for 5 steps, and 5 are enough"),
    ("ex_02_2", heun, "off by up to"),
    ("ex_02_3", 1, "the even grid itself"),
    ("ex_02_3", 3.0, "try below 1"),
    ("ex_02_3", 0.05, "too far"),
    ("ex_02_3", 0.9, "not far enough"),
    ("ex_02_3", -1.0, "a positive number .* got -1.0"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name, capsys):
    getattr(checks, name)(solutions.SOLUTIONS[name])
    assert capsys.readouterr().out.startswith("correct: ")


STUBS = [(name, stub) for name in EXERCISES for stub in (None, ...)]
PLAIN_FUNCTIONS = [name for name in EXERCISES if isfunction(solutions.SOLUTIONS[name])]  # and no Triton kernels
STUBS += [(name, stub) for name in PLAIN_FUNCTIONS for stub in (lambda *_: None, lambda *_: ..., raising_stub)]


@pytest.mark.parametrize(("name", "stub"), STUBS)
def test_a_stub_is_not_yet_right_and_not_wrong(name, stub, capsys):
    getattr(checks, name)(stub)
    assert capsys.readouterr().out == "not yet\n"


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_every_exercise_has_a_check_and_the_reverse():
    assert [name for name in sorted(vars(checks)) if name.startswith("ex_")] == EXERCISES


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("name", [n for n in EXERCISES if callable(solutions.SOLUTIONS[n])])
def test_a_result_in_place_of_the_function_is_explained(name):
    with pytest.raises(WrongAnswerError, match="hand over the function itself"):
        getattr(checks, name)(3)


@pytest.mark.wrong_shapes
def test_a_word_in_place_of_a_number_is_explained():
    with pytest.raises(WrongAnswerError, match=r"a positive number .* got 'large'"):
        checks.ex_02_3("large")


def test_the_readers_own_error_is_left_alone():
    with pytest.raises(KeyError, match="mine"):
        checks.ex_01_2(lambda share, factor: {}["mine"])


def test_jupyter_shows_the_hint_alone():
    assert WrongAnswerError("the sign")._render_traceback_() == ["not right: the sign"]
