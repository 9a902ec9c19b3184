"""What stands in for a residual that was not computed.

A step cache keeps the last residuals r_i of the block stack (output minus input, one tensor a stream) with the time t_i
each was computed at. At a skipped time t the stack's output is its input plus a weighted sum of them,

    r(t) ~ sum_i w_i(t) r_i,     sum_i w_i(t) = 1

and predictors differ in the weights alone. `Extrapolation` is the polynomial through the last `order + 1` anchors:
w_i = prod_{j != i} (t - t_j) / (t_i - t_j) (Lagrange's form). Order 0 is `reuse`, the choice of TeaCache, MagCache and
EasyCache; order 1 is `forecast`, a straight line, and order 2 is `quadratic`. They are close to TaylorSeer (Liu et al.
2025, arXiv 2503.06923) with one difference that matters: they are polynomials in time and not in the step index, so
they stay right on shifted, uneven grids.

`Hermite` damps the higher orders (HiCache, Feng et al. 2025, arXiv 2508.16984): with x = (t - t_1) / h, h the gap
between the last two anchors, and D_k the k-th divided difference of the last k + 1 anchors,

    r(t) ~ r_1 + sum_k h^k D_k  s^k H_k(s x),     H_1(x) = 2 x,  H_2(x) = 4 x^2 - 2  (physicists' Hermite polynomials)

The paper counts x in steps, and so makes the constant in H_2 depend on how fine the grid is; here its unit is the gap.
It does not pass through its anchors: what it gives up in order it gains in stability.

The cost of any predictor is memory: `num_anchors` residuals for each guidance branch, and as many computed steps before
the first skip.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from diffusion_opt.models.block_stack import Streams

PredictorName = Literal["reuse", "forecast", "quadratic", "hermite"]


@dataclass(frozen=True, slots=True)
class Anchor:
    """A residual that was computed, stream by stream, and the time in [0, 1] it was computed at."""

    time: float
    residual: Streams


def keep_anchor(anchors: list[Anchor], new: Anchor, most: int) -> None:
    """Append an anchor to the last `most`; it replaces one of its time, as a scheduler that calls twice leaves it."""
    if anchors and anchors[-1].time == new.time:
        anchors.pop()
    anchors.append(new)
    del anchors[:-most]


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """The polynomial of a given order through the last `order + 1` anchors."""

    order: int

    def __post_init__(self) -> None:
        if self.order < 0:
            raise ValueError(f"the order of an extrapolation is 0 (reuse), 1 (a line) or more, got {self.order}")

    @property
    def num_anchors(self) -> int:
        """How many residuals it needs: its memory, and the computed steps before the first skip."""
        return self.order + 1

    def with_anchors(self, available: int) -> "Extrapolation":
        """Itself, or what fewer anchors allow: one is reused, through two goes a line. `available` is 1 or more."""
        return self if available >= self.num_anchors else Extrapolation(available - 1)

    def weights(self, times: list[float], at: float) -> list[float]:
        """Weights of anchors at different `times`, oldest first, for a prediction `at` another; they add up to 1."""
        return [
            prod((at - other) / (own - other) for j, other in enumerate(times) if i != j) for i, own in enumerate(times)
        ]

    def predict(self, anchors: list[Anchor], time: float) -> Streams:
        """The residual of each stream expected at `time`. Raises ValueError with fewer than `num_anchors` anchors."""
        if len(anchors) < self.num_anchors:
            raise ValueError(f"order {self.order} needs {self.num_anchors} computed steps, got {len(anchors)}")
        last = anchors[-self.num_anchors :]
        weights = self.weights([anchor.time for anchor in last], time)
        predicted = {name: weights[-1] * residual for name, residual in last[-1].residual.items()}
        for weight, anchor in zip(weights[:-1], last[:-1], strict=True):
            for name, residual in anchor.residual.items():
                predicted[name] = predicted[name] + weight * residual
        return predicted


@dataclass(frozen=True, slots=True)
class Hermite(Extrapolation):
    """Backward differences up to `order` on scaled Hermite polynomials, of which `scale` in (0, 1] is the damping."""

    scale: float = 0.5  # of HiCache's code; at 0.5 ** 0.5 and order 1 this is the straight line

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"the order of a Hermite forecast is 1 or more, got {self.order}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"the scale of a Hermite forecast lies in (0, 1], got {self.scale}")

    def weights(self, times: list[float], at: float) -> list[float]:
        """Weights as in `Extrapolation.weights`: each order adds a multiple of its divided difference."""
        gap = times[-1] - times[-2]
        x = self.scale * (at - times[-1]) / gap
        polynomial, before = 1.0, 0.0  # H_0 and, so that the recursion can start, H_-1
        weights = [0.0] * (len(times) - 1) + [1.0]
        for k in range(1, self.order + 1):
            polynomial, before = 2 * x * polynomial - 2 * (k - 1) * before, polynomial
            used = range(len(times) - 1 - k, len(times))
            for i in used:
                difference = prod(1 / (times[i] - times[j]) for j in used if i != j)
                weights[i] += (self.scale * gap) ** k * polynomial * difference
        return weights


PREDICTORS: dict[str, Extrapolation] = {
    "reuse": Extrapolation(0),
    "forecast": Extrapolation(1),
    "quadratic": Extrapolation(2),
    "hermite": Hermite(2),
}
