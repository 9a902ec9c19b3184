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
    softened_reverse_kl f = (r + 1) log((r + 1) / (2 r))            h = 1 / (1 + r)

A weight that grows with r listens to the places where the student has too little, and so covers modes; one that falls
seeks them. r is not known; a discriminator of real pictures (here: the GAN head on the features of the fake score, at
the same noisy x_t) estimates it as exp(logit). As in the paper r is clipped and the weights are scaled to mean 1 over
the batch, so that a change of divergence is no change of step size and constants in h do not matter.

Between little noise and much the ratio has another scale: where there is much, everything looks alike and r is near 1.
`RatioBins` keeps a running mean of r for each part of time and divides by it, so that samples are weighted against
others at their own noise (FastGen's `ratio_normalization`, on by default there; here it is an option).

A weight needs a discriminator that tells something, and a discriminator needs training. At the budget of
`benchmarks/results/distillation_methods.json` the student of `f_distill` makes 19 updates from its start, and its row
(4.27, 1 step) is not apart from that of plain `dmd2` (4.24): the table says nothing of the divergence. Whether a run
does is in its own log: `weight_low` and `weight_high` are the ends of h in a batch, and while both lie near 1 it
descends the reverse KL, whatever the divergence is called.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.training import processes

DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "js": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 2,
    "pearson": lambda r: 2 * r.square(),
    "neyman": lambda r: 2 / r,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
}
RATIO_LIMITS = (0.1, 20.0)


class RatioBins(nn.Module):
    """A running mean of the ratio in each of `num` equal parts of [low, high] of time; part of a method's `kept`.

    Raises ValueError for no parts, or a rate outside [0, 1).
    """

    def __init__(self, num: int = 10, low: float = 0.0, high: float = 1.0, rate: float = 0.9) -> None:
        super().__init__()
        if num < 1 or not 0 <= rate < 1 or not low < high:
            raise ValueError(f"num must be at least 1, rate in [0, 1) and low < high, got {num}, {rate}, {low}, {high}")
        self.low, self.high, self.rate = low, high, rate
        self.register_buffer("means", torch.ones(num))

    @torch.no_grad()
    def forward(self, ratio: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Take note of the ratios at times t, over all processes, and give them over the means of their parts."""
        num = len(self.means)
        index = ((t - self.low) / (self.high - self.low) * num).long().clamp(0, num - 1)
        sums = torch.zeros(2, num, device=ratio.device, dtype=self.means.dtype)
        sums[0].index_add_(0, index, torch.ones_like(ratio, dtype=sums.dtype))
        sums[1].index_add_(0, index, ratio.to(sums.dtype))
        count, total = processes().total(sums)
        mean = self.rate * self.means + (1 - self.rate) * total / count.clamp(min=1)
        self.means.copy_(torch.where(count > 0, mean, self.means))
        return ratio / self.means[index].to(ratio.dtype)


def divergence_weight(
    divergence: str,
    logits: Float[Tensor, "b heads"],
    limits: tuple[float, float] = RATIO_LIMITS,
    bins: RatioBins | None = None,
    t: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """h(r) of each sample with r = exp(mean logit over the heads) within `limits`, scaled to mean 1; no gradient.

    With `bins`, r is then divided by their mean at the times `t`. Raises ValueError for an unknown divergence, limits
    that are not 0 < low < high, or bins without times.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not 0 < limits[0] < limits[1]:
        raise ValueError(f"limits of the ratio must satisfy 0 < low < high, got {limits}")
    if bins is not None and t is None:
        raise ValueError("bins of time need the times of the samples: give t=")
    with torch.no_grad():
        ratio = logits.mean(1).exp().clamp(*limits)
        ratio = ratio if bins is None else bins(ratio, t)
        weight = DIVERGENCES[divergence](ratio)
        return weight / weight.mean()
