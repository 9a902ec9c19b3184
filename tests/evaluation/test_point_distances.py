"""Distances between sets of points against their closed forms."""

import math

import pytest
import torch

from diffusion_opt.evaluation.point_distances import mmd, sliced_wasserstein


def normal(num: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dim", [2, 5])
def test_a_shift_is_its_length_over_the_root_of_the_dimension(dim):
    points, shift = normal(50, dim, 0), torch.arange(1.0, dim + 1, dtype=torch.float64)
    expected = shift.norm().item() / math.sqrt(dim)
    assert sliced_wasserstein(points, points + shift, num_projections=20_000) == pytest.approx(expected, rel=0.02)


def test_scaling_normal_points_is_the_difference_of_deviations():
    """Every projection of N(0, s^2) is N(0, s^2), and two normal laws on a line are |s1 - s2| apart."""
    points = normal(20_000, 2, 1)
    assert sliced_wasserstein(points, 1.7 * points) == pytest.approx(0.7, rel=0.02)


def test_order_does_not_matter_and_equal_sets_are_at_no_distance():
    points = normal(60, 3, 2)
    assert sliced_wasserstein(points, points.flip(0)) == 0
    assert sliced_wasserstein(points, normal(60, 3, 3), seed=1) == sliced_wasserstein(
        normal(60, 3, 3), points.flip(0), seed=1
    )


def test_mmd_of_two_normal_laws_is_the_closed_form():
    """With kernel width s: E k = (s^2 / (s^2 + 2))^(d/2) exp(-|m|^2 / (2 (s^2 + 2))) for N(0, 1) against N(m, 1)."""
    scale, shift = 0.8, torch.tensor([0.6, -0.3], dtype=torch.float64)
    width = scale**2 + 2
    expected = 2 * scale**2 / width * (1 - math.exp(-shift.square().sum().item() / (2 * width)))
    assert mmd(normal(4000, 2, 4), normal(4000, 2, 5) + shift, scale) == pytest.approx(expected, abs=3e-3)


def test_mmd_of_a_few_points_is_the_sum_by_hand():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0], [3.0]])

    def k(x, y):
        return math.exp(-((x - y) ** 2) / 2)

    among_b = 2 * (k(0, 2) + k(0, 3) + k(2, 3)) / 6
    between = sum(k(x, y) for x in (0, 1) for y in (0, 2, 3)) / 6
    assert mmd(a, b) == pytest.approx(k(0, 1) + among_b - 2 * between, abs=1e-12)


def test_two_samples_of_one_law_are_near_zero_without_bias():
    values = [mmd(normal(200, 2, 2 * i), normal(200, 2, 2 * i + 1)) for i in range(30)]
    assert min(values) < 0 < max(values)
    assert abs(sum(values) / 30) < 1e-3


@pytest.mark.wrong_shapes
def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same number of points"):
        sliced_wasserstein(normal(3, 2, 0), normal(4, 2, 0))
    with pytest.raises(ValueError, match=r"2 … 4000 points"):
        mmd(normal(1, 2, 0), normal(4, 2, 0))
    with pytest.raises(ValueError, match="scale must be positive"):
        mmd(normal(4, 2, 0), normal(4, 2, 0), scale=0.0)
