"""Exercises of lesson 11."""

import math

import torch
from torch import Tensor

from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


def ex_11_1(answer: Answer) -> None:
    """passes_for_update(teacher_passes, fake_updates): DMD2's cost of one student update, per sample, in passes."""
    teacher, updates = 1, 7
    found = called(answer, (teacher, updates))
    if found is None:
        return
    student_turn, fake_turn = 3 + teacher + 1, 4
    mistakes = (
        (2 + teacher + 2 * updates, "the backward passes are missing: where gradient flows, a pass costs 3, not 1"),
        (student_turn, "between two updates of the student the fake score has its turns, and they cost too"),
        (student_turn + fake_turn, "the fake score has fake_updates turns for one of the student"),
        (student_turn + (updates + 1) * fake_turn, "fake_updates are all of the fake score's turns: not one more"),
        (student_turn + updates * (fake_turn + teacher), "the teacher rests while the fake score learns"),
        (student_turn + updates * (fake_turn + 2), "in the fake score's turn the student only makes pictures: 1 pass"),
        (student_turn + updates * 3, "the fake score learns from new pictures: the student's pass is missing there"),
        (student_turn - 1 + updates * fake_turn, "in the student's turn the fake score is asked too, without gradient"),
        (student_turn + 2 + updates * fake_turn, "no gradient flows through the fake score in the student's turn"),
        (student_turn + 1 + updates * fake_turn, "teacher_passes counts both passes of guidance already"),
        ((student_turn + updates * fake_turn) / (updates + 1), "the cost of one student update, not the mean turn"),
    )
    compare(found, student_turn + updates * fake_turn, mistakes)
    praise(
        answer, "with 4 updates of the fake score it is over two thirds of the cost, the guided teacher under a tenth"
    )


def ex_11_2(answer: Answer) -> None:
    """extrapolate(seconds, distances, at): the power law through points, at another budget."""
    seconds, distances, at = [10.0, 20.0, 40.0, 100.0], [9.0, 5.0, 5.5, 3.0], 400.0
    found = called(answer, (seconds, distances, at))
    if found is None:
        return
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (seconds, distances))
    expected = _line(x.log(), y.log(), math.log(at)).exp()
    mistakes = (
        (_line(x, y, at), "this is a straight line without logarithms: it falls below 0 at some budget"),
        (_line(x, y.log(), at).exp(), "the logarithm of the seconds is missing: this halves in equal times, forever"),
        (_line(x.log(), y, math.log(at)), "the logarithm of the distance is missing: this line falls below 0"),
        (expected.log(), "this is still the logarithm of the distance"),
        (_line(x.log()[-2:], y.log()[-2:], math.log(at)).exp(), "a line through the last two points alone: use all"),
        (_line(x.log()[[0, -1]], y.log()[[0, -1]], math.log(at)).exp(), "first and last point alone: use all"),
        (y[-1] * at / x[-1], "that would be in proportion: more training, worse student"),
        (y[-1] * x[-1] / at, "1 / seconds is a slope of -1; the points have their own"),
        (y[-1], "the last point again; the line goes on"),
    )
    if isinstance(found, int | float):
        found = torch.tensor(float(found), dtype=torch.float64)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.reshape(())
    compare(found, expected, mistakes)
    praise(answer, "two numbers from three points leave little to check them by: the row held back below is the check")


def ex_11_3(answer: Answer) -> None:
    """breakeven(training_s, teacher_s, student_s): from how many pictures on the student has paid."""
    training, teacher, student = 600.0, 0.25, 0.011
    found = called(answer, (training, teacher, student))
    if found is None:
        return
    exact = training / (teacher - student)
    mistakes = (
        (training / teacher, "the student's pictures are not free: each saves the difference of the two"),
        (math.ceil(training / teacher), "the student's pictures are not free: each saves the difference of the two"),
        (training / student, "this is how many pictures the student makes in the training's time"),
        (math.ceil(training / student), "this is how many pictures the student makes in the training's time"),
        (training * (teacher - student), "divide by what a picture saves: seconds per picture"),
        (exact, "pictures come whole: round up"),
        (math.floor(exact), "at that number it has not quite paid: round up"),
        (-math.floor(exact), "the sign: a picture saves teacher_s - student_s"),
        (-exact, "the sign: a picture saves teacher_s - student_s"),
    )
    compare(found, math.ceil(exact), mistakes)
    if answer(training, 0.2, 0.3) != math.inf:
        raise WrongAnswerError("right where the student is faster; one that is slower never pays: return math.inf")
    praise(
        answer,
        "ask the same for the teacher at its cheapest setting of the student's quality: only that one is a rival",
    )


def _line(x: Tensor, y: Tensor, at: float) -> Tensor:
    """The least-squares line through points, at a place."""
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return y.mean() + slope * (at - x.mean())
