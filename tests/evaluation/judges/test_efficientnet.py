"""The shipped ImageNet network: equal to the package it comes from, fed with any picture, refused when altered."""

import pytest
import torch
from safetensors.torch import load_file

from diffusion_opt.datasets import verify
from diffusion_opt.evaluation.judges.efficientnet import imagenet_features, imagenet_folder, load_imagenet, shown


def drawn(size: int) -> torch.Tensor:
    """The picture that `benchmarks/convert_imagenet.py` showed to the package's own code."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([torch.sin(x * (0.11 + 0.2 * c)) * torch.cos(y * (0.07 + 0.3 * c)) for c in range(3)])[None]


@pytest.mark.parametrize("size", [64, 224])
def test_features_are_those_of_the_package_up_to_half_precision(size: int) -> None:
    expected = load_file(imagenet_folder() / "answers.safetensors")[str(size)]
    found = load_imagenet()(drawn(size))
    assert (found - expected).norm() / expected.norm() < 5e-3
    assert (load_imagenet()(drawn(size).flip(1)) - expected).norm() / expected.norm() > 0.1  # channels have an order


def test_the_folder_is_sealed() -> None:
    verify(imagenet_folder())


@pytest.mark.parametrize(
    ("shape", "side"),
    [((2, 1, 28, 28), 64), ((2, 3, 16, 16), 64), ((2, 3, 64, 48), 128), ((2, 1, 90, 70), 192), ((2, 3, 300, 500), 224)],
)
def test_pictures_of_any_size_are_shown_square_and_in_color(shape: tuple[int, ...], side: int) -> None:
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert shown(given).shape == (2, 3, side, side)
    assert imagenet_features(given).shape == (2, 320)


def test_gray_is_color_with_equal_channels() -> None:
    gray = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(imagenet_features(gray), imagenet_features(gray.expand(-1, 3, -1, -1)), atol=1e-5)


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        load_imagenet()(torch.zeros(1, 3, 40, 64))
