"""The curve of TeaCache: which change of the output goes with which change of the input.

TeaCache needs f, from the change of block 0's modulated input to the change of the stack's residual. The published
curves are polynomials of degree 4 (`polynomial.py`), of which most are negative or fall on part of their range. Here
the fit keeps to what is known about f:

    f(0) = 0,  f never falls,  f is linear between knots and constant beyond what was seen

by isotonic regression (pool adjacent violators; Barlow et al. 1972): sort by input change; while a value is below the
one before, replace both by their mean.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def relative_change(new: Float[Tensor, "b *s"], old: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    """d = mean|new - old| / mean|old| of each sample; 0 where nothing changed, infinite if all of old is 0."""
    difference = (new - old).abs().flatten(1).mean(1, dtype=torch.float32)
    size = old.abs().flatten(1).mean(1, dtype=torch.float32)
    return torch.where(difference == 0, 0.0, difference / size)


def identity(change: float) -> float:
    """f(d) = d: the change of the input stands for that of the output."""
    return change


@dataclass(frozen=True, slots=True)
class IsotonicCurve:
    """A calibrated f: linear between the knots, 0 at 0, never falling, constant beyond the last knot."""

    changes: tuple[float, ...]  # knots: relative change of the modulated input, rising from 0
    rescaled: tuple[float, ...]  # f at the knots: relative change of the residual

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.changes))
        monotone = all(a <= b for a, b in pairwise(self.rescaled))
        if len(self.changes) != len(self.rescaled) or len(self.changes) < 2 or self.changes[0] or self.rescaled[0]:
            raise ValueError(f"a curve needs two knots or more, the first (0, 0), got {self.changes}, {self.rescaled}")
        if not (rising and monotone):
            raise ValueError(
                f"the knots of a curve rise and its values never fall, got {self.changes}, {self.rescaled}"
            )

    def __call__(self, change: float) -> float:
        """The change of the residual that goes with a relative `change` >= 0 of the modulated input."""
        if change >= self.changes[-1]:
            return self.rescaled[-1]
        right = bisect_right(self.changes, change)
        (x0, x1), (y0, y1) = self.changes[right - 1 : right + 1], self.rescaled[right - 1 : right + 1]
        return y0 + (y1 - y0) * (change - x0) / (x1 - x0)


def fit_isotonic(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> IsotonicCurve:
    """The isotonic fit of y to x. Each knot is the mean of the pairs that were pooled.

    Raises ValueError if a change is negative or not finite, or if no input ever changed.
    """
    if not bool((x >= 0).all() and (y >= 0).all() and x.isfinite().all() and y.isfinite().all()):
        raise ValueError("changes must be finite and 0 or more; an infinite one means that a residual was all zero")
    if not x.numel() or float(x.max()) == 0:
        raise ValueError("the modulated input never changed, so there is nothing to fit: is the model trained?")
    pools: list[tuple[float, float, int]] = []  # mean of x, mean of y, number of pairs
    for index in torch.argsort(x, stable=True).tolist():
        pool = (float(x[index]), float(y[index]), 1)
        while pools and (pools[-1][0] >= pool[0] or pools[-1][1] >= pool[1]):
            pool = _pooled(pools.pop(), pool)
        pools.append(pool)
    knots = [(change, value) for change, value, _ in pools if change > 0]
    return IsotonicCurve((0.0, *(change for change, _ in knots)), (0.0, *(value for _, value in knots)))


def _pooled(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    n = a[2] + b[2]
    return (a[0] * a[2] + b[0] * b[2]) / n, (a[1] * a[2] + b[1] * b[2]) / n, n


def explained_variance(y: Float[Tensor, " n"], fitted: Float[Tensor, " n"]) -> float:
    """R^2: 1 for a perfect fit, 0 for one no better than the mean of y."""
    missed = float((y - fitted).square().sum())
    return 1.0 if missed <= 1e-12 * float(y.square().sum()) else 1 - missed / float((y - y.mean()).square().sum())
