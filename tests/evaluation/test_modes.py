"""Counting modes: exact on points put where they belong, and what a missing one looks like."""

import pytest
import torch

from diffusion_opt.evaluation.modes import mode_shares, modes_covered, stray_share
from diffusion_opt.flow import GaussianMixtureVelocity

RING = GaussianMixtureVelocity.ring(num_modes=8, radius=3.0, std=0.3)


def test_points_are_counted_where_they_lie() -> None:
    means = RING.means.float()
    edge = torch.tensor([3.0 + 0.89, 0.0])  # 2.97 deviations from mode 0
    points = torch.stack([means[0], edge, means[2], torch.zeros(2)])
    torch.testing.assert_close(mode_shares(points, RING)[:3], torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64))
    assert modes_covered(points, RING) == 2
    assert stray_share(points, RING) == 0.25
    assert stray_share(points, RING, radius=2.0) == 0.5


def test_samples_of_the_mixture_cover_it() -> None:
    points = RING.sample(4000, torch.Generator().manual_seed(0))
    assert modes_covered(points, RING) == 8
    assert stray_share(points, RING) == pytest.approx(0.0111, abs=0.006)  # exp(-9 / 2)


def test_a_thin_mode_is_not_covered() -> None:
    points = RING.sample(4000, torch.Generator().manual_seed(0))
    near = torch.cdist(points, RING.means.float()).argmin(1) == 3
    few = torch.cat([points[~near], points[near][:80]])  # a fifth of its fair share
    assert modes_covered(few, RING) == 7
    assert modes_covered(few, RING, share=0.1) == 8


def test_weights_of_the_mixture_count() -> None:
    rare = GaussianMixtureVelocity(torch.tensor([0.96, 0.04]), torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.ones(2, 2))
    points = torch.cat([torch.zeros(98, 2), torch.full((2, 2), 9.0) * torch.tensor([1.0, 0.0])])
    assert modes_covered(points, rare) == 2


def test_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        modes_covered(torch.zeros(0, 2), RING)
