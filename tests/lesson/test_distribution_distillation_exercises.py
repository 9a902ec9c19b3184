"""Exercises of lesson 10: each typical mistake gets its hint, and other right answers than the solution's pass."""

from dataclasses import replace

import pytest
import torch

from diffusion_opt.distillation.distribution import DIVERGENCES
from diffusion_opt.distillation.distribution.failures import PlaneRun
from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.checks.distribution_distillation import BROKEN
from diffusion_opt.lesson.solutions.distribution_distillation import push, weight_of

first = torch.func.vmap(torch.func.grad(lambda r: (r - 1) * r.log()))


def scaled(distance, time=True):
    """The push over another distance (x - x_T, x - x_phi) -> (B,)."""

    def answer(x, x_t, t, v_teacher, v_fake):
        t = t.reshape(-1, 1, 1, 1)
        off = distance((x - x_t + t * v_teacher).flatten(1), (x - x_t + t * v_fake).flatten(1))
        return (t if time else 1) * (v_teacher - v_fake) / off.reshape(-1, 1, 1, 1)

    return answer


MISTAKES = [
    ("ex_10_1", lambda *case: -push(*case), "the sign"),
    ("ex_10_1", scaled(lambda off, _: torch.ones(3)), "the scale is missing"),
    ("ex_10_1", scaled(lambda off, _: off.abs().mean(1), time=False), "the time is missing"),
    ("ex_10_1", scaled(lambda off, _: off.abs().mean()), "the whole batch"),
    ("ex_10_1", scaled(lambda _, off: off.abs().mean(1)), "the teacher's prediction"),
    ("ex_10_1", scaled(lambda off, _: off.square().mean(1)), "not of its square"),
    ("ex_10_1", scaled(lambda off, _: off.norm(dim=1)), "not the length"),
    ("ex_10_1", scaled(lambda off, _: off.abs().sum(1)), "not their sum"),
    ("ex_10_3", lambda f, r: weight_of(f, r) / r**2, "the factor r\\^2 is missing"),
    ("ex_10_3", lambda f, r: weight_of(f, r) / r, "one factor r is missing"),
    ("ex_10_3", lambda f, r: first(r) * r**2, "needs the second"),
    ("ex_10_3", lambda f, r: first(r) * r, "one factor r; h"),
    ("ex_10_3", lambda f, r: f(r) * r**2, "f itself"),
    ("ex_10_3", lambda f, r: weight_of(f, r) / weight_of(f, r).mean(), "up to scale"),
    ("ex_10_2", BROKEN, "you changed nothing"),
    ("ex_10_2", PlaneRun(), "you changed fake_updates, warmup, fake_rate"),
    ("ex_10_2", replace(BROKEN, guidance=2.0), "guidance is as in the sound run"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "hint"), [({"warmup": 300}, "loses sight"), ({"fake_updates": 10}, "still 0.5 to 1")]
)
def test_a_cure_that_does_not_help_is_trained_and_explained(change, hint):
    with pytest.raises(WrongAnswerError, match=hint):
        checks.ex_10_2(replace(BROKEN, **change))


@pytest.mark.slow
def test_any_rate_that_keeps_up_passes(capsys):
    checks.ex_10_2(replace(BROKEN, fake_rate=4.0))
    assert capsys.readouterr().out.startswith("correct: ")


@pytest.mark.wrong_shapes
def test_something_else_than_a_run_is_explained():
    with pytest.raises(WrongAnswerError, match="a PlaneRun is asked for, got dict"):
        checks.ex_10_2({"fake_rate": 2.0})


def test_the_weights_of_the_package_follow_from_their_functions():
    r = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    functions = {
        "reverse_kl": lambda r: -r.log(),
        "kl": lambda r: r * r.log(),
        "jeffreys": lambda r: (r - 1) * r.log(),
        "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        "squared_hellinger": lambda r: (1 - r.sqrt()) ** 2,
        "pearson": lambda r: (r - 1) ** 2,
        "neyman": lambda r: (r - 1) ** 2 / r,
        "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    }
    assert functions.keys() == DIVERGENCES.keys()
    for name, f in functions.items():
        torch.testing.assert_close(weight_of(f, r), DIVERGENCES[name](r))
