"""Exercises of lesson 00."""

import torch

from diffusion_opt.flow import clean_from_velocity
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


def ex_00_1(answer: Answer) -> None:
    """clean_prediction(x_t, v, t): the clean picture from a point of the path and the velocity there."""
    generator = torch.Generator().manual_seed(1)
    x_t, v = (torch.randn(2, 3, 5, 7, generator=generator) for _ in range(2))
    t = torch.tensor([0.25, 0.8])
    column = t.reshape(-1, 1, 1, 1)
    try:
        found = called(answer, (x_t, v, t))
    except RuntimeError as error:
        raise WrongAnswerError(
            f"shapes do not fit ({error}); t has shape (B,), one time per picture: reshape it to (B, 1, 1, 1) first"
        ) from error
    if found is None:
        return
    mistakes = (
        (x_t + column * v, "the sign: v = e - x points towards the noise, so the way back to x is against it"),
        (x_t - v, "the time is missing: x_t is only t of the way to the noise, so only t v has to be taken back"),
        (x_t - (1 - column) * v, "t and 1 - t are swapped: here t = 1 is noise and t = 0 is data"),
        (x_t + (1 - column) * v, "this is the noise e = x_t + (1 - t) v; the exercise asks for the picture x"),
    )
    compare(found, clean_from_velocity(x_t, v, t), mistakes)
    praise(answer, "a network that predicts v predicts the clean picture at every step")
