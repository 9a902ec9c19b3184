"""Points in the plane for the tests of distribution distillation: networks, data, and exact expectations."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.distribution import FeatureHeads
from diffusion_opt.distillation.distribution.rollout import StudentRollout
from diffusion_opt.flow import GaussianMixtureVelocity, VelocityModel
from diffusion_opt.models import PointVelocity

Method = TypeVar("Method", bound=StudentRollout)


def toy(kind: type[Method], teacher: VelocityModel, **options: object) -> Method:
    """A method on small networks, no classes."""
    networks = {"student": PointVelocity(width=32, seed=0), "fake_score": PointVelocity(width=32, seed=1)}
    return kind(**networks | {"teacher": teacher, "sample_shape": (2,)} | options)


def fresh_head(width: int = 32) -> FeatureHeads:
    """Heads for such a network."""
    return FeatureHeads.of(PointVelocity(width=width), (2,), hidden=8)


def points_of(mixture: GaussianMixtureVelocity, num: int, seed: int = 0) -> ImageData:
    """Samples as data of one class."""
    points = mixture.sample(num, torch.Generator().manual_seed(seed))
    return ImageData(points, torch.zeros(num, dtype=torch.int64), ("point",))


def quadrature(num: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (z, e) and weights of the expectation over two standard normals; exact for polynomials."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(num))
    weights = weights / weights.sum()
    z, e = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.flatten(), e.flatten(), torch.outer(weights, weights).flatten()
