"""A small network for points in the plane: the twin of an image model on which every method runs in seconds.

On a mixture of Gaussians the teacher's velocity is known exactly (`flow.GaussianMixtureVelocity`). This network is the
student, or the fake score, of such a teacher. It is a plain perceptron; times enter as a few waves, sin and cos of
pi/2, pi, 2 pi and 4 pi times the time, so that derivatives in time stay small. More `waves` make the embedding as wide
as those of image models, with their troubles (it makes continuous-time methods unstable; Lu & Song 2024, arXiv
2410.11081, section 4.1). A two-time network learns jumps, u(x_t, t, r); a guided one takes the guidance scale as an
input. With its last layer at zero it starts as the zero velocity.
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition


class PointVelocity(nn.Module):
    """VelocityModel of points (B, dim), with `num_classes` classes (0: none).

    With `two_time` it takes a second time r, with `guided` a guidance scale. The weights depend on `seed` alone.
    """

    def __init__(
        self,
        dim: int = 2,
        num_classes: int = 0,
        two_time: bool = False,
        width: int = 128,
        depth: int = 3,
        seed: int = 0,
        guided: bool = False,
        waves: int = 4,
    ) -> None:
        super().__init__()
        self.num_classes, self.two_time, self.guided = num_classes, two_time, guided
        self.dim, self.width, self.depth, self.waves = dim, width, depth, waves
        times = 2 if two_time else 1
        sizes = [dim + 2 * waves * times + guided + (num_classes + 1 if num_classes else 0), *[width] * depth]
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
        guidance: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """Velocity (B, dim) at times t (B,), or the mean velocity of the jump to r; without r, r = t.

        Raises ValueError for r without `two_time`, for a guidance scale (B,) without `guided` or the reverse, and for
        a condition that does not fit the classes.
        """
        if r is not None and not self.two_time:
            raise ValueError("this network knows one time; build it with two_time=True for jumps to r")
        if (guidance is not None) != self.guided:
            raise ValueError(f"this network has guided={self.guided}: {'give' if self.guided else 'drop'} `guidance`")
        given = 0 if condition is None else condition.num_classes
        if given != self.num_classes:
            raise ValueError(f"the network has {self.num_classes} classes, the condition {given}")
        parts = [x_t, self._waves(t, x_t)]
        if self.two_time:
            parts.append(self._waves(t - (t if r is None else r), x_t))
        if guidance is not None:
            parts.append(guidance.to(x_t.dtype)[:, None])
        if condition is not None:
            parts.append(nn.functional.one_hot(condition.labels, self.num_classes + 1).to(x_t.dtype))
        return self.layers(torch.cat(parts, dim=1))

    def with_slot(self, two_time: bool = False, guided: bool = False) -> "PointVelocity":
        """A copy that also takes r or a guidance scale, and gives the same output at first: a student's start.

        Raises ValueError for a network that takes either already.
        """
        if self.two_time or self.guided:
            raise ValueError(f"this network has two_time={self.two_time}, guided={self.guided} already")
        sizes = {name: getattr(self, name) for name in ("dim", "num_classes", "width", "depth", "waves")}
        student = PointVelocity(**sizes, two_time=two_time, guided=guided)
        weights = self.state_dict()
        first = weights["layers.0.weight"]
        known = self.dim + 2 * self.waves
        new = first.new_zeros(len(first), student.layers[0].in_features - first.shape[1])
        weights["layers.0.weight"] = torch.cat([first[:, :known], new, first[:, known:]], dim=1)
        student.load_state_dict(weights)
        return student

    def _waves(self, t: Float[Tensor, " b"], like: Tensor) -> Float[Tensor, "b waves"]:
        frequencies = math.pi / 2 * 2.0 ** torch.arange(self.waves, device=like.device, dtype=like.dtype)
        angles = t.to(like.dtype)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)
