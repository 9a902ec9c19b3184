"""How far the student's velocity is from its target: two robust distances, one number for each item of the batch.

Squared error lets few bad samples rule. Both distances here weigh a sample less the farther it is off:

    pseudo-Huber    d = sqrt(|D|^2 + c^2) - c           gradient D / sqrt(|D|^2 + c^2): of length 1 far away
                    (Song & Dhariwal 2023, arXiv 2310.14189, equation 7; c = 0.03 sqrt(elements))
    adaptive        d = sg(1 / (|D|^2 + c)^p) |D|^2     gradient 2 D / (|D|^2 + c)^p: p = 1/2 is like Huber's, with
                    p = 1 a far sample hardly counts (Geng et al. 2025, arXiv 2505.13447, section 4.3; c = 1e-3)

|D|^2 is the sum over the elements of an item, as in both papers' code; sg stops the gradient. The value of the adaptive
loss with p = 1 is close to 1 whatever the error is: it is no measure of progress, which is why every method logs the
plain squared error beside its loss.
"""

import math

from jaxtyping import Float
from torch import Tensor


def pseudo_huber(difference: Float[Tensor, "b *s"], scale: float = 0.03) -> Float[Tensor, " b"]:
    """sqrt(|difference|^2 + c^2) - c per item, c = scale * sqrt(elements); smooth near 0, linear far from it."""
    squared = difference.flatten(1).square().sum(1)
    c = scale * math.sqrt(difference[0].numel())
    return squared / ((squared + c**2).sqrt() + c)  # the same number without cancellation near 0


def adaptive_loss(difference: Float[Tensor, "b *s"], power: float = 1.0, c: float = 1e-3) -> Float[Tensor, " b"]:
    """|difference|^2 / sg(|difference|^2 + c)^power per item; `power` 0 is the squared error."""
    squared = difference.flatten(1).square().sum(1)
    return squared / (squared.detach() + c) ** power


def squared_error(difference: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    """|difference|^2 per item."""
    return difference.flatten(1).square().sum(1)


DISTANCES = {"huber": pseudo_huber, "adaptive": adaptive_loss, "squared": squared_error}
