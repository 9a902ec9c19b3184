"""Exercises of lesson 12: each typical mistake gets its hint, and other right recipes than the solution's pass."""

import pytest

from diffusion_opt.caching import ErrorBoundedCache, MagCache, ScheduledCache, StepTable, TeaCache
from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.models import load
from diffusion_opt.quantization import DynamicInt8
from diffusion_opt.recipes import Recipe, Solver, Student

MISTAKES = [
    ("ex_12_1", ("dynamic_int8", "ptq"), "both change the weights"),
    ("ex_12_1", ("student", "tea_cache"), "compete and do not conflict"),
    ("ex_12_1", ("solver", "tea_cache"), "solver and the cache are different factors"),
    ("ex_12_1", ("solver", "student"), "as the cell above shows"),
    ("ex_12_1", ("student", "magic"), "no technique 'magic'"),
    ("ex_12_2", lambda macs, rate, new, new_rate, overhead: macs / rate / (new / new_rate), "overhead is missing"),
    ("ex_12_2", lambda macs, rate, new, new_rate, overhead: macs / new, "MACs alone"),
    (
        "ex_12_2",
        lambda macs, rate, new, new_rate, overhead: (overhead + new / new_rate) / (overhead + macs / rate),
        "upside down",
    ),
    (
        "ex_12_2",
        lambda macs, rate, new, new_rate, overhead: macs / rate / (overhead + new / new_rate),
        "there before as well",
    ),
    (
        "ex_12_2",
        lambda macs, rate, new, new_rate, overhead: (overhead + macs / rate) / (new / new_rate),
        "still there after",
    ),
    (
        "ex_12_2",
        lambda macs, rate, new, new_rate, overhead: (overhead + macs / rate) / (overhead + new / rate),
        "at the new rate",
    ),
    (
        "ex_12_2",
        lambda macs, rate, new, new_rate, overhead: overhead + macs / rate / (new / new_rate),
        "cannot be added",
    ),
    ("ex_12_2", lambda *_: 17.0, "got 17"),
    ("ex_12_3", Recipe((Student("fashion-1step"),)), "without training"),
    ("ex_12_3", Recipe((Solver(12),)), r"4\.2 times .* fewer steps, or steps that a cache skips$"),
    ("ex_12_3", Recipe((Solver(4), DynamicInt8())), r"12\.5 times .* not one MAC fewer"),
    ("ex_12_3", Recipe(), r"1\.0 times"),
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
        ("ex_12_1", ("student",), "a pair of two names"),
        ("ex_12_1", "student", "a pair of two names is asked for, got 'student'"),
        ("ex_12_3", (Solver(2),), "a Recipe is asked for, .* got tuple"),
        ("ex_12_3", 20, "a Recipe is asked for, .* got int"),
    ],
)
def test_something_else_than_asked_for_is_explained(name, wrong, hint):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)


def test_the_order_of_the_two_names_does_not_matter(capsys):
    checks.ex_12_1(("scheduled_cache", "solver"))
    assert capsys.readouterr().out.startswith("correct: ")


@pytest.mark.parametrize(
    "recipe", [Recipe((Solver(2, "euler"),)), Recipe((Solver(4), DynamicInt8(), TeaCache(9.0, "reuse")))]
)
def test_any_recipe_that_saves_enough_passes(recipe, capsys):
    checks.ex_12_3(recipe)
    said = capsys.readouterr().out
    assert said.startswith("correct: 2") and "times less arithmetic" in said


def test_the_pair_that_conflicts_is_the_one_that_the_pipeline_refuses():
    """The lesson's own example, found by trial: every other pair without calibrated techniques is taken."""
    refused = load("fashion")
    with pytest.raises(ValueError, match="distilled for its own steps"):
        Recipe((Student("fashion-4step"), Solver(8))).apply(refused)
    for pair in [(Student("fashion-4step"), DynamicInt8()), (Student("fashion-4step"), TeaCache(0.2)),
                 (Solver(8), DynamicInt8()), (Solver(8), TeaCache(0.2)), (DynamicInt8(), TeaCache(0.2))]:  # fmt: skip
        Recipe(pair).apply(load("fashion"))


CALIBRATED = {
    "scheduled_cache": ScheduledCache("fashion-15"),
    "mag_cache": MagCache(0.1, "fashion-calibration"),
    "step_table": StepTable(0.2, "fashion-calibration"),
    "error_bounded_cache": ErrorBoundedCache(0.05, calibration="fashion-error-bound"),
}


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize(("other", "technique"), [("solver", Solver(12)), ("student", Student("fashion-4step"))])
def test_a_pair_that_the_pipeline_refuses_is_a_right_answer(name, other, technique, capsys):
    checks.ex_12_1((other, name))
    assert capsys.readouterr().out.startswith("correct: ")
    pipe = load("fashion")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"calibrat|belongs|searched"):
        Recipe((technique, CALIBRATED[name])).apply(pipe)("bag")
