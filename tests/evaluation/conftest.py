"""Shipped networks, references and real images, loaded once for the folder."""

import pytest
import torch

from diffusion_opt.datasets import ImageData, load_fashion_mnist
from diffusion_opt.evaluation import FashionFeatures, Reference, load_features, load_reference


@pytest.fixture(scope="package")
def network() -> FashionFeatures:
    return load_features("fashion")


@pytest.fixture(scope="package")
def reference() -> Reference:
    return load_reference("fashion")


@pytest.fixture(scope="package")
def real() -> ImageData:
    """The first 100 training images of each class, shuffled."""
    data = load_fashion_mnist("train")
    picked = torch.cat([(data.labels == label).nonzero()[:100, 0] for label in range(10)])
    order = picked[torch.randperm(len(picked), generator=torch.Generator().manual_seed(0))]
    return ImageData(data.images[order], data.labels[order], data.class_names)
