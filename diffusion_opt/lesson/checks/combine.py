"""Exercises of lesson 12."""

from functools import partial
from types import EllipsisType

import torch

from diffusion_opt.evaluation import count
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, is_stub, not_yet, praise
from diffusion_opt.models import load
from diffusion_opt.recipes import TECHNIQUES, Recipe

CALIBRATED = {
    "scheduled_cache",
    "mag_cache",
    "step_table",
    "error_bounded_cache",
}  # each belongs to one network and run


def ex_12_1(answer: tuple[str, str] | EllipsisType | None) -> None:
    """conflict: two techniques of different kinds that a recipe may hold and the shipped pipelines refuse together."""
    if is_stub(answer):
        not_yet()
        return
    if not isinstance(answer, tuple | list | set | frozenset) or len(answer) != 2:
        raise WrongAnswerError(f"a pair of two names is asked for, got {answer!r}")
    if unknown := sorted(str(name) for name in answer if name not in TECHNIQUES):
        raise WrongAnswerError(f"there is no technique {unknown[0]!r}; there are {', '.join(TECHNIQUES)}")
    first, second = (TECHNIQUES[name][1] for name in answer)
    if first == second:
        raise WrongAnswerError(
            f"these exclude each other because both change the {first.name}, so no recipe can hold them; a pair of "
            "different kinds is asked for, which a recipe holds and a pipeline refuses"
        )
    if set(answer) == {"student", "tea_cache"}:
        raise WrongAnswerError(
            "these compete and do not conflict: both save passes, and a student with 4 steps or 1 leaves the cache "
            "nothing to skip; the pipeline takes them all the same"
        )
    if set(answer) == {"student", "solver"}:
        raise WrongAnswerError(
            "a pipeline refuses these, as the cell above shows: a student learned jumps between its own times. Find "
            "another pair, with something that was calibrated or searched on one run"
        )
    if {"student", "solver"} & set(answer) and CALIBRATED & set(answer):
        praise(
            answer, "what was calibrated or searched on one run says nothing about another, so it refuses another run"
        )
        return
    raise WrongAnswerError(f"the {first.name} and the {second.name} are different factors, and the pipeline takes both")


def ex_12_2(answer: Answer) -> None:
    """predicted_speedup(macs, rate, new_macs, new_rate, overhead_s): from arithmetic, its rates and the overhead."""
    macs, rate, new_macs, new_rate, overhead = 12e9, 4e10, 0.15e9, 6e10, 5e-4
    found = called(answer, (macs, rate, new_macs, new_rate, overhead))
    if found is None:
        return
    before, after = macs / rate, new_macs / new_rate
    mistakes = (
        (before / after, "the overhead is missing: it is paid before and after, whatever the network costs"),
        (macs / new_macs, "this is the ratio of the MACs alone: the rate changes too, and the overhead stays"),
        ((overhead + after) / (overhead + before), "upside down: a speed-up is the time before over the time after"),
        (before / (overhead + after), "the overhead was there before as well"),
        ((overhead + before) / after, "the overhead is still there after"),
        ((overhead + before) / (overhead + new_macs / rate), "the new pipeline runs its MACs at the new rate"),
        (overhead + before / after, "seconds and a ratio cannot be added: add the overhead to both times"),
    )
    compare(found, (overhead + before) / (overhead + after), mistakes)
    praise(answer, f"the arithmetic promised {before / after:.0f} times here, the overhead leaves {found:.0f}")


def ex_12_3(answer: Recipe | EllipsisType | None) -> None:
    """my_recipe: at least 20 times less arithmetic than the teacher, without a student."""
    if is_stub(answer):
        not_yet()
        return
    if not isinstance(answer, Recipe):
        raise WrongAnswerError(f"a Recipe is asked for, Recipe((technique, ...)), got {type(answer).__name__}")
    names = [entry["technique"] for entry in answer.to_dict()["techniques"]]
    if "student" in names:
        raise WrongAnswerError("a student is trained for this; the exercise asks how far one gets without training")
    pipe = load("fashion")
    pipe.set_progress_bar_config(disable=True)

    def arithmetic(**settings: int) -> int:
        call = partial(pipe, "bag", generator=torch.Generator().manual_seed(0), output_type="pt", **settings)
        with torch.no_grad():
            return count(call, pipe.transformer).macs

    teacher = pipe.config.default_steps * arithmetic(num_inference_steps=1)
    answer.apply(pipe)
    gain = teacher / arithmetic()
    if gain < 20:
        hint = "fewer steps, or steps that a cache skips"
        if {"dynamic_int8", "ptq"} & set(names):
            hint += "; fewer bits make a MAC cheaper and not one MAC fewer"
        raise WrongAnswerError(f"{gain:.1f} times less arithmetic than the teacher, at least 20 are asked: {hint}")
    praise(answer, f"{gain:.1f} times less arithmetic; add it to LADDER and see what its pictures are worth")
