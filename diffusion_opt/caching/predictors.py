"""What stands in for a residual that was not computed.

A step cache keeps the last residuals r_i of the block stack (output minus input) with the time t_i each was computed
at. At a skipped time t the stack's output is its input plus a prediction from them, the polynomial through the last
`order + 1` anchors evaluated at t (Lagrange's form):

    r(t) ~ sum_i w_i r_i,     w_i = prod_{j != i} (t - t_j) / (t_i - t_j)

Order 0 is `reuse`, the choice of TeaCache, MagCache and EasyCache: r(t) ~ r_1. Order 1 is `forecast`, a straight line
through the last two, close to TaylorSeer (Liu et al. 2025, arXiv 2503.06923) with one difference that matters: it is
a line in time and not in the step index, so it stays right on shifted, uneven grids. It costs one more tensor.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

PredictorName = Literal["reuse", "forecast"]


@dataclass(frozen=True, slots=True)
class Anchor:
    """A residual that was computed, and the time in [0, 1] it was computed at."""

    time: float
    residual: Float[Tensor, "b n d"]


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """The polynomial of a given order through the last `order + 1` anchors."""

    order: int

    def __post_init__(self) -> None:
        if self.order < 0:
            raise ValueError(f"the order of an extrapolation is 0 (reuse), 1 (a line) or more, got {self.order}")

    @property
    def num_anchors(self) -> int:
        return self.order + 1

    def weights(self, times: list[float], at: float) -> list[float]:
        """Lagrange weights of anchors at different `times` for a prediction `at` another; they add up to 1."""
        weights = []
        for i, own in enumerate(times):
            weight = 1.0
            for j, other in enumerate(times):
                if i != j:
                    weight *= (at - other) / (own - other)
            weights.append(weight)
        return weights

    def predict(self, anchors: list[Anchor], time: float) -> Float[Tensor, "b n d"]:
        """The residual expected at `time`. Raises ValueError with fewer than `num_anchors` anchors."""
        if len(anchors) < self.num_anchors:
            raise ValueError(f"order {self.order} needs {self.num_anchors} computed steps, got {len(anchors)}")
        last = anchors[-self.num_anchors :]
        weights = self.weights([anchor.time for anchor in last], time)
        predicted = weights[-1] * last[-1].residual
        for weight, anchor in zip(weights[:-1], last[:-1], strict=True):
            predicted = predicted + weight * anchor.residual
        return predicted


PREDICTORS: dict[str, Extrapolation] = {"reuse": Extrapolation(0), "forecast": Extrapolation(1)}
