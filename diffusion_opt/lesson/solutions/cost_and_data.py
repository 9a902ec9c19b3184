"""Solutions of lesson 11."""

import math

import torch


def passes_for_update(teacher_passes, fake_updates):
    student_turn = 1 + 2 + teacher_passes + 1
    fake_turn = 1 + 1 + 2
    return student_turn + fake_updates * fake_turn


def extrapolate(seconds, distances, at):
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (seconds, distances))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() + slope * (math.log(at) - x.mean())).exp().item()


def breakeven(training_s, teacher_s, student_s):
    if student_s >= teacher_s:
        return math.inf
    return math.ceil(training_s / (teacher_s - student_s))


SOLUTIONS = {
    "ex_11_1": passes_for_update,
    "ex_11_2": extrapolate,
    "ex_11_3": breakeven,
}
