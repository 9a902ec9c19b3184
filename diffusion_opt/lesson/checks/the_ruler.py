"""Exercises of lesson 02b."""

import torch
from torch import Tensor

from diffusion_opt.evaluation import frechet_distance, moments, precision_recall
from diffusion_opt.lesson.checks.answers import Answer, called, compare, praise


def ex_02b_1(answer: Answer) -> None:
    """frechet(mean1, cov1, mean2, cov2): the Fréchet distance of two Gaussians."""
    generator = torch.Generator().manual_seed(1)
    one, two = (scale * torch.randn(9, 4, generator=generator, dtype=torch.float64) for scale in (1.0, 2.0))
    (mean1, cov1), (mean2, cov2) = moments(one), moments(two + 1)
    found = called(answer, (mean1, cov1, mean2, cov2))
    if found is None:
        return
    off, traces = (mean1 - mean2).square().sum(), cov1.trace() + cov2.trace()
    right = frechet_distance(mean1, cov1, mean2, cov2)
    cross = (off + traces - right) / 2
    by_entries = (cov1 @ cov2).clamp(min=0).sqrt().trace()
    mistakes = (
        (off, "this is the part of the means; the covariances are missing"),
        (right - off, "this is the part of the covariances; the squared distance of the means is missing"),
        (right - off + off.sqrt(), "the distance of the means enters squared"),
        (off + traces - cross, "the trace of the root counts twice: - 2 tr (C1 C2)^(1/2)"),
        (off + traces + 2 * cross, "the sign: what both covariances share is taken off"),
        (off + traces - 2 * by_entries, "the root of a matrix is not the root of each of its numbers; use eigenvalues"),
        (off + traces - 2 * cross.square(), "take the root of each eigenvalue before you add them"),
    )
    compare(_number(found), right, mistakes)
    praise(answer, "two clouds with the same mean and covariance are at distance 0, whatever else differs")


def ex_02b_2(answer: Answer) -> None:
    """covered(points, by, neighbors): the share of points inside a ball of another set."""
    generator = torch.Generator().manual_seed(3)
    points, by = torch.randn(40, 3, generator=generator), 0.6 * torch.randn(25, 3, generator=generator)
    found = called(answer, (points, by, 3))
    if found is None:
        return
    own, across = torch.cdist(by, by), torch.cdist(points, by)
    radii = {k: own.topk(k, largest=False).values[:, -1] for k in (3, 4)}
    mistakes = (
        (
            _share((across <= radii[3]).any(1)),
            "the nearest point of a set to one of its own is that point itself: k + 1",
        ),
        (_share((across <= radii[4]).all(1)), "inside one ball is enough, not inside all of them"),
        (precision_recall(points, by, 3)[0], "the other way round: the balls stand around the points of `by`"),
        (_share(across.min(1).values <= radii[4].mean()), "each ball has a radius of its own"),
        (_share((across <= radii[4]).any(1)) * len(points), "this is the number of points, not their share"),
    )
    right = _number(precision_recall(by, points, 3)[0])
    compare(_number(found), right, [(_number(wrong), hint) for wrong, hint in mistakes])
    praise(answer, "precision asks it of generated points, recall of real ones: the same function, the sets swapped")


def _number(found: object) -> Tensor:
    """A number as a tensor, whether the reader returns the one or the other."""
    return torch.as_tensor(found, dtype=torch.float64)


def _share(inside: Tensor) -> float:
    return inside.double().mean().item()
