"""Real pictures by name, generated ones that are real training images, and what grain looks like."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.evaluation.judges import RealPictures


@pytest.fixture(scope="package")
def fashion() -> RealPictures:
    return RealPictures.of("fashion")


@pytest.fixture(scope="package")
def pictures(fashion: RealPictures) -> Tensor:
    """500 training images that the floor does not use; class i mod 10."""
    return fashion.held_out[5000:5500]


@pytest.fixture(scope="package")
def labels(pictures: Tensor) -> Tensor:
    return torch.arange(len(pictures)) % 10


@pytest.fixture(scope="package")
def grainy(pictures: Tensor) -> Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return (pictures + 0.05 * noise).clamp(-1, 1)
