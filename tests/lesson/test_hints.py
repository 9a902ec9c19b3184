"""Hints come one at a time and do not run out; `use` hands out an answer that has passed, and only that."""

import pytest

from diffusion_opt.lesson import checks, solutions
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.checks.hints import HINTS, Hints


def test_every_exercise_has_hints_and_the_reverse():
    assert {f"ex_{name}" for name in HINTS} == set(solutions.SOLUTIONS)
    assert all(len(hints) >= 2 for hints in HINTS.values())


def test_a_call_gives_one_hint_and_the_next_call_the_next(capsys):
    hint, said = Hints({"05_2": ("idea", "way")}), []
    for _ in range(3):
        hint("05_2")
        said.append(capsys.readouterr().out)
    assert said[0] == "hint 1 of 2: idea (1 more)\n"
    assert said[1] == said[2] == "hint 2 of 2: way (the last one; the solution is folded below)\n"


def test_exercises_and_instances_do_not_share_what_was_given(capsys):
    hint, other = (Hints({"a": ("1", "2"), "b": ("3", "4")}) for _ in range(2))
    hint("a")
    hint("ex_b")
    other("a")
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["hint 1 of"] * 3


def test_an_exercise_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no exercise '99_9'; there are 00_1, 00b_1"):
        checks.hint("99_9")


def test_only_an_answer_that_has_passed_is_used(capsys):
    def packaged(share, factor):
        return 0.0

    def mine(share, factor):
        return 1 / ((1 - share) + share / factor)

    assert checks.use(mine, packaged) is packaged
    checks.ex_01_2(mine)
    assert checks.use(mine, packaged) is mine
    assert "from here on: your mine" in capsys.readouterr().out

    def mine(share, factor):  # defined anew, and wrong now
        return factor

    with pytest.raises(WrongAnswerError):
        checks.ex_01_2(mine)
    assert checks.use(mine, packaged) is packaged
    assert checks.use(..., packaged) is checks.use(None, packaged) is packaged
