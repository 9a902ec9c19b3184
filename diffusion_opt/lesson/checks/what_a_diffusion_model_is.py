"""Exercises of lesson 00b."""

import torch

from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


def ex_00b_1(answer: Answer) -> None:
    """expected_velocity(x_t, t, points): E[e - x | x_t] for data that are `points`, equally likely."""
    generator = torch.Generator().manual_seed(1)
    points, x_t = torch.randn(5, 3, generator=generator), torch.randn(2, 3, generator=generator)
    t = 0.7
    try:
        found = called(answer, (x_t, t, points))
    except RuntimeError as error:
        raise WrongAnswerError(
            f"shapes do not fit ({error}); x_t is (b, d) and points (n, d): all pairs are x_t[:, None] and points, "
            "(b, n, d)"
        ) from error
    if found is None:
        return
    e = (x_t[:, None] - (1 - t) * points) / t
    exponent = -e.square().sum(2) / 2

    def mean(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (weights[:, :, None] * values).sum(1)

    weights = exponent.softmax(1)
    mistakes = (
        (mean(weights, e), "this is E[e | x_t]; the velocity is e - x"),
        (mean(weights, points), "this is E[x | x_t], the clean picture; the velocity is e - x"),
        (mean(weights, points - e), "the sign: v = e - x"),
        ((e - points).mean(1), "all points weigh the same here; those whose noise would be improbable weigh less"),
        (mean(exponent.exp(), e - points), "the weights must add up to 1 for each x_t: divide by their sum"),
        (mean((2 * exponent).softmax(1), e - points), "the exponent is half of the squared length of e"),
        (mean((-exponent).softmax(1), e - points), "the sign of the exponent: improbable noise weighs less, not more"),
        (mean(exponent.softmax(0), e - points), "the weights add up to 1 over the points, not over the places x_t"),
    )
    compare(found, mean(weights, e - points), mistakes)
    praise(answer, "the best network there is answers with a mean over the data, sharper the less noise there is")


def ex_00b_2(answer: Answer) -> None:
    """guided_velocity(network, x_t, t, classes, scale): classifier-free guidance."""
    ring = GaussianMixtureVelocity.ring(num_modes=6, radius=1.5, std=0.4, num_classes=2)
    x_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, classes, scale = (
        torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64),
        ClassCondition(torch.arange(4) % 2, 2),
        3.0,
    )
    found = called(answer, (ring, x_t, t, classes, scale))
    if found is None:
        return
    cond, uncond = ring(x_t, t, classes), ring(x_t, t, classes.drop())
    mistakes = (
        (
            cond + scale * (cond - uncond),
            "a scale of 1 must give the velocity with the class: start from the one without",
        ),
        (uncond + scale * (uncond - cond), "the sign: the difference points from without the class to with it"),
        (cond + scale * (uncond - cond), "the roles are swapped: start without the class and move toward it"),
        (scale * cond, "the velocity without the class is missing"),
        (uncond + (cond - uncond) / scale, "multiply the difference by the scale"),
        (scale * (cond - uncond), "the difference alone: add it to the velocity without the class"),
        (cond, "this is a scale of 1"),
    )
    compare(found, uncond + scale * (cond - uncond), mistakes)
    praise(answer, "two passes per step: half of the cost of a guided picture is the pass without the prompt")
