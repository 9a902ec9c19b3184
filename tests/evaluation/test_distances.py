"""Distances agree with closed forms, with brute force and with torchmetrics."""

import pytest
import torch

from diffusion_opt.evaluation import (
    FashionFeatures,
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
)
from diffusion_opt.evaluation.distances import bootstrap_counts, bootstrap_frechet, bootstrap_interval


def normal(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift


def test_parity_with_torchmetrics(network: FashionFeatures, real) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    images, noisy = real.images[:400], real.images[400:700] + 0.1 * normal(300, 1, 28, 28)
    metric = FrechetInceptionDistance(feature=network)
    metric.update(images, real=True)
    metric.update(noisy, real=False)
    ours = frechet_distance(*moments(network(noisy)), *moments(network(images)))
    assert ours.item() == pytest.approx(metric.compute().item(), rel=1e-4)


def test_identical_sets_are_at_distance_zero() -> None:
    first = moments(normal(500, 7))
    assert frechet_distance(*first, *first).item() == pytest.approx(0, abs=1e-10)


def test_independent_gaussians_have_the_closed_form() -> None:
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 1.0, 0.0])
    deviation1, deviation2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    distance = frechet_distance(mean1, torch.diag(deviation1**2), mean2, torch.diag(deviation2**2))
    expected = (mean1 - mean2).square().sum() + (deviation1 - deviation2).square().sum()
    assert distance.item() == pytest.approx(expected.item())


def test_distance_is_symmetric_batched_and_survives_singular_covariances() -> None:
    mean1, cov1 = moments(normal(4, 7))  # rank 3 in 7 dimensions
    mean2, cov2 = moments(normal(300, 7, seed=1, scale=2.0))
    forward, backward = frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1)
    assert forward.item() == pytest.approx(backward.item(), rel=1e-6)
    batch = frechet_distance(torch.stack([mean1, mean2]), torch.stack([cov1, cov2]), mean2, cov2)
    assert batch.tolist() == pytest.approx([forward.item(), 0.0], rel=1e-6, abs=1e-8)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        moments(normal(1, 3))


def test_vectorized_bootstrap_equals_the_loop() -> None:
    features, strata = normal(60, 5, shift=3.0), torch.arange(60) % 3
    counts = bootstrap_counts(strata, 4, torch.Generator().manual_seed(0))
    mean, cov = moments(normal(200, 5, seed=1))
    for row, distance in zip(counts, bootstrap_frechet(features, counts, mean, cov), strict=True):
        resample = features.repeat_interleave(row.long(), dim=0)
        assert distance.item() == pytest.approx(frechet_distance(*moments(resample), mean, cov).item(), rel=1e-8)


def test_resamples_keep_each_stratum_and_follow_the_seed() -> None:
    strata = torch.tensor([0, 2, 2, 0, 2, 7])
    counts = bootstrap_counts(strata, 50, torch.Generator().manual_seed(0))
    for stratum, size in ((0, 2), (2, 3), (7, 1)):
        assert (counts[:, strata == stratum].sum(1) == size).all()
    assert counts[:, 0].unique().tolist() == [0, 1, 2]
    assert torch.equal(counts, bootstrap_counts(strata, 50, torch.Generator().manual_seed(0)))


def test_interval_covers_what_another_sample_would_give() -> None:
    """Of 60 data sets of the same model, about 95 % of the intervals hold the mean distance at that sample count."""
    mean, cov = torch.zeros(4), torch.eye(4)
    distances, intervals = [], []
    for seed in range(60):
        features = normal(200, 4, seed=seed, scale=1.2)
        distances.append(frechet_distance(*moments(features), mean, cov).item())
        counts = bootstrap_counts(torch.zeros(200, dtype=torch.long), 200, torch.Generator().manual_seed(seed))
        intervals.append(bootstrap_interval(distances[-1], bootstrap_frechet(features, counts, mean, cov)))
    center = sum(distances) / len(distances)
    covered = sum(low <= center <= high for low, high in intervals)
    assert 51 <= covered <= 60
    assert all(low <= distance <= high for distance, (low, high) in zip(distances, intervals, strict=True))


def test_confidence_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="got 95"):
        bootstrap_interval(1.0, torch.ones(3), confidence=95)


def test_kernel_distance_is_seeded_and_leaves_the_global_generator_alone() -> None:
    same, other = normal(1500, 6, seed=1), normal(1500, 6, seed=2, shift=0.5)
    state = torch.random.get_rng_state()
    first = kernel_distance(normal(1500, 6), other, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == kernel_distance(normal(1500, 6), other, seed=3)
    assert abs(kernel_distance(normal(1500, 6), same, seed=3)[0]) < 0.02 < first[0]


def test_precision_and_recall_by_brute_force() -> None:
    real, generated = normal(40, 2), normal(30, 2, seed=1, shift=0.7)

    def covered(points: torch.Tensor, by: torch.Tensor) -> float:
        radii = [sorted((member - by).norm(dim=1).tolist())[3] for member in by]
        hits = [any((p - m).norm() <= r for m, r in zip(by, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    assert precision_recall(real, generated) == pytest.approx((covered(generated, real), covered(real, generated)))


def test_recall_falls_when_a_mode_is_dropped_and_precision_does_not() -> None:
    def modes(count: int, seed: int) -> torch.Tensor:
        return torch.cat([normal(200, 3, seed=seed + mode, shift=10.0 * mode) for mode in range(count)])

    real = modes(4, seed=0)
    full_precision, full_recall = precision_recall(real, modes(4, seed=50))
    precision, recall = precision_recall(real, modes(3, seed=50))
    assert full_recall > 0.9
    assert recall == pytest.approx(0.75 * full_recall, abs=0.05)
    assert precision == pytest.approx(full_precision, abs=0.05)


def test_too_few_samples_for_neighbors_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 samples on each side, got 10 real and 3 generated"):
        precision_recall(normal(10, 2), normal(3, 2))
