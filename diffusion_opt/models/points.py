"""A small network for points in the plane: the twin of an image model on which every method runs in seconds.

On a mixture of Gaussians the teacher's velocity is known exactly (`flow.GaussianMixtureVelocity`). This network is the
student, or the fake score, of such a teacher. It is a plain perceptron; times enter as a few smooth waves, so that
derivatives in time stay small (a wide Fourier embedding is what makes continuous-time methods unstable; Lu & Song 2024,
arXiv 2410.11081, section 4.1). A two-time network learns jumps, u(x_t, t, r); with its last layer at zero it starts as
the zero velocity.
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition

WAVES = 4  # sin and cos of pi/2, pi, 2 pi and 4 pi times the time


class PointVelocity(nn.Module):
    """VelocityModel of points (B, dim), with `num_classes` classes (0: none) and, with `two_time`, a second time r.

    The weights depend on `seed` alone.
    """

    def __init__(
        self,
        dim: int = 2,
        num_classes: int = 0,
        two_time: bool = False,
        width: int = 128,
        depth: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes, self.two_time = num_classes, two_time
        times = 2 if two_time else 1
        sizes = [dim + 2 * WAVES * times + (num_classes + 1 if num_classes else 0), *[width] * depth]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
            self.layers = nn.Sequential(*layers, nn.Linear(width, dim))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self,
        x_t: Float[Tensor, "b d"],
        t: Float[Tensor, " b"],
        condition: ClassCondition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """Velocity (B, dim) at times t (B,), or the mean velocity of the jump to r; without r, r = t.

        Raises ValueError for r without `two_time`, and for a condition that does not fit the classes.
        """
        if r is not None and not self.two_time:
            raise ValueError("this network knows one time; build it with two_time=True for jumps to r")
        given = 0 if condition is None else condition.num_classes
        if given != self.num_classes:
            raise ValueError(f"the network has {self.num_classes} classes, the condition {given}")
        parts = [x_t, _waves(t, x_t)]
        if self.two_time:
            parts.append(_waves(t - (t if r is None else r), x_t))
        if condition is not None:
            parts.append(nn.functional.one_hot(condition.labels, self.num_classes + 1).to(x_t.dtype))
        return self.layers(torch.cat(parts, dim=1))


def _waves(t: Float[Tensor, " b"], like: Tensor) -> Float[Tensor, "b waves"]:
    frequencies = math.pi / 2 * 2.0 ** torch.arange(WAVES, device=like.device, dtype=like.dtype)
    angles = t.to(like.dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
