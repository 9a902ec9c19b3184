"""What goes wrong in distribution matching, seen early: each alarm is a number that is logged and a limit to it.

A run does not diverge when it fails; losses look the same and pictures slowly become fewer, harsher or wrong. Numbers
that tell, all computed on the student's turn from what is there anyway:

    lag        mean|x - x_phi|^2 / mean|x - x_T|^2. The fake score is the best denoiser of the student's pictures, so it
               beats the teacher at them and this is below 1 (1 when they agree); well above 1 it lags: give it more
               updates (K), a higher rate, a longer warm-up
    gap        mean|x_phi - x_T| / mean|x - x_T|: how far student and teacher disagree; 0 when they agree
    contrast   standard deviation of the pictures over that of the reference: above 1 over-saturated (guidance too
               strong, run too long), below 1 washed out
    recall     k-nearest-neighbor recall of the reference, on pixels of one batch: falls when modes drop
    distance   energy distance to the reference on pixels, 2 E|x - y| - E|x - x'| - E|y - y'|, over E|y - y'|

The last three need `reference` pictures of the teacher (the pictures of a pair store) or real ones. On one batch they
are rough: alarms judge a running average of the student's turns. Features of a classifier judge better, at the end of a
run (`evaluation.quality`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.evaluation import precision_recall
from diffusion_opt.evaluation.distances import NEIGHBORS


def observed(
    x: Float[Tensor, "b *s"],
    teacher_x: Float[Tensor, "b *s"],
    fake_x: Float[Tensor, "b *s"],
    reference: Float[Tensor, "n *s"] | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`lag` and `gap`; with a reference also what `compared` gives, against as many random pictures of it."""
    lag = (x - fake_x).square().mean() / (x - teacher_x).square().mean()
    seen = {"lag": lag, "gap": (fake_x - teacher_x).abs().mean() / (x - teacher_x).abs().mean()}
    if reference is None:
        return seen
    index = torch.randint(len(reference), (len(x),), generator=generator, device=generator.device)
    return seen | compared(x, reference[index])


@torch.no_grad()
def compared(x: Float[Tensor, "b *s"], reference: Float[Tensor, "n *s"]) -> dict[str, Tensor]:
    """`contrast`, `distance` and, from 4 samples on, `recall` of x against a reference."""
    flat, other = x.flatten(1).double(), reference.flatten(1).double()
    among = _mean_distance(other)
    distance = (2 * torch.cdist(flat, other).mean() - _mean_distance(flat) - among) / among
    seen = {"contrast": x.std() / reference.std(), "distance": distance.to(x.dtype)}
    if min(len(x), len(reference)) > NEIGHBORS:
        seen["recall"] = x.new_tensor(precision_recall(other, flat)[1])
    return seen


def _mean_distance(points: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean distance of two different points."""
    return torch.cdist(points, points).sum() / (len(points) * (len(points) - 1))


def smoothed(seen: dict[str, float], values: dict[str, float], share: float = 0.05) -> dict[str, float]:
    """The running average `seen` after one more step: each value counts `share`, one not logged in it stays."""
    return seen | {
        name: seen.get(name, value) + share * (value - seen.get(name, value)) for name, value in values.items()
    }


@dataclass(frozen=True, slots=True)
class Alarms:
    """Limits of the numbers above; None switches an alarm off. A value that is not logged raises none."""

    max_lag: float | None = 1.25  # about 1 when student and teacher agree
    max_contrast: float | None = None  # above 1
    min_recall: float | None = None  # compare with what two batches of the reference give
    max_distance: float | None = None  # 0 for the same distribution
    after: int = 500  # steps; before that the student still changes fast

    def check(self, step: int, values: dict[str, float]) -> str | None:
        """What is wrong and what helps, or None."""
        if step < self.after:
            return None
        above = {
            "lag": (self.max_lag, LAG),
            "contrast": (self.max_contrast, CONTRAST),
            "distance": (self.max_distance, DISTANCE),
        }
        for name, (limit, advice) in above.items():
            if limit is not None and not values.get(name, limit) <= limit:  # not a number is wrong too
                return f"{name} is {values[name]:.3g} at step {step}, above {limit:g}: {advice}"
        if self.min_recall is not None and not values.get("recall", self.min_recall) >= self.min_recall:
            return f"recall is {values['recall']:.3g} at step {step}, below {self.min_recall:g}: {RECALL}"
        return None


LAG = "the fake score does not know the student's pictures; raise fake_updates, fake_rate or warmup"
CONTRAST = "the student over-saturates; lower the guidance scale or stop earlier"
DISTANCE = "the student moves away from the reference; start from a trajectory student or lower the learning rate"
RECALL = "the student drops modes; raise fake_updates, or take a divergence that covers them"
