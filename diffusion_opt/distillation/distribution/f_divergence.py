"""Which divergence the student descends: one weight on the distribution matching gradient.

Distribution matching descends the reverse KL divergence, which is content when the student covers some of the teacher's
modes. Any other f-divergence D_f = E_student[f(r)], with r = p_teacher(x_t) / p_student(x_t), has the same gradient but
for a weight on each sample (Xu et al. 2025, "One-step diffusion models with f-divergence distribution matching", arXiv
2502.15681, theorem 1):

    gradient of x  =  h(r) (score_student - score_teacher),      h(r) = f''(r) r^2

    reverse_kl          f = -log r                                  h = 1
    kl                  f = r log r                                 h = r
    jeffreys            f = (r - 1) log r                           h = 1 + r
    js                  f = r log r - (r + 1) log((r + 1) / 2)      h = r / (1 + r)
    squared_hellinger   f = (1 - sqrt r)^2                          h = sqrt(r) / 2
    pearson             f = (r - 1)^2                               h = 2 r^2
    neyman              f = (r - 1)^2 / r                           h = 2 / r

A weight that grows with r listens to the places where the student has too little, and so covers modes; one that falls
seeks them. r is not known; a discriminator of real pictures (here: the GAN head on the features of the fake score, at
the same noisy x_t) estimates it as exp(logit). As in the paper r is clipped and the weights are scaled to mean 1 over
the batch, so that a change of divergence is no change of step size and constants in h do not matter.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "js": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 2,
    "pearson": lambda r: 2 * r.square(),
    "neyman": lambda r: 2 / r,
}
RATIO_LIMITS = (0.1, 20.0)


def divergence_weight(
    divergence: str, logits: Float[Tensor, "b heads"], limits: tuple[float, float] = RATIO_LIMITS
) -> Float[Tensor, " b"]:
    """h(r) of each sample with r = exp(mean logit over the heads) within `limits`, scaled to mean 1; no gradient.

    Raises ValueError for an unknown divergence or limits that are not 0 < low < high.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not 0 < limits[0] < limits[1]:
        raise ValueError(f"limits of the ratio must satisfy 0 < low < high, got {limits}")
    with torch.no_grad():
        ratio = logits.mean(1).exp().clamp(*limits)
        weight = DIVERGENCES[divergence](ratio)
        return weight / weight.mean()
