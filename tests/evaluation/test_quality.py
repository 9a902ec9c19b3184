"""The quality record: right on real images, worse on worse ones, and refused where it would mislead."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from diffusion_opt.datasets import ImageData
from diffusion_opt.evaluation import (
    METRIC_NAME,
    FashionFeatures,
    Quality,
    Reference,
    compare,
    floor_distance,
    load_features,
    load_reference,
    quality,
)
from diffusion_opt.evaluation.quality import teacher_gap
from diffusion_opt.evaluation.reference import make_reference


@pytest.fixture(scope="module")
def of_real(real: ImageData) -> Quality:
    return quality(real.images, real.labels)


def test_real_images_reach_the_floor(of_real: Quality) -> None:
    assert of_real.distance_low <= of_real.floor <= of_real.distance_high
    assert of_real.distance_low <= of_real.distance <= of_real.distance_high
    assert of_real.class_agreement > 0.9
    assert min(of_real.precision, of_real.recall) > 0.8
    assert abs(of_real.kernel_distance) < 3 * of_real.kernel_deviation
    assert (of_real.num_samples, of_real.features, of_real.reference) == (1000, "fashion", "test")
    assert of_real.metric == METRIC_NAME == "FD (fashion features)"


def test_distance_grows_with_noise_and_with_blur(real: ImageData, of_real: Quality) -> None:
    noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [quality(real.images + s * noise, real.labels, resamples=10).distance for s in (0.1, 0.2, 0.4)]
    blurred = [quality(F.avg_pool2d(real.images, k, 1, k // 2), real.labels, resamples=10).distance for k in (3, 5)]
    for series in (noisy, blurred):
        grown = [of_real.distance, *series]
        assert grown == sorted(grown)
        assert grown[1] > of_real.distance_high


def test_mirrored_images_are_seen(real: ImageData, of_real: Quality) -> None:
    assert quality(real.images.flip(-1), real.labels, resamples=10).distance > 10 * of_real.distance_high


def test_a_dropped_class_costs_recall_and_agreement_sees_wrong_classes(real: ImageData, of_real: Quality) -> None:
    images = real.images.clone()
    boots, others = real.labels == 9, (real.labels != 9).nonzero()[:100, 0]
    images[boots] = images[others]
    dropped = quality(images, real.labels, resamples=10)
    assert dropped.recall < of_real.recall - 0.03
    assert dropped.class_agreement == pytest.approx(of_real.class_agreement - 0.1, abs=0.02)
    assert dropped.distance > of_real.distance_high


def test_same_seed_same_record(real: ImageData) -> None:
    first, second = (quality(real.images[:200], real.labels[:200], seed=5, resamples=20) for _ in range(2))
    assert first == second


def test_micro_images_use_their_own_features() -> None:
    from diffusion_opt.datasets import load_fashion_mnist

    test = load_fashion_mnist("test", size=16)
    measured = quality(test.images[:500], test.labels[:500], resamples=10)
    assert (measured.features, measured.num_samples) == ("fashion-micro", 500)
    assert measured.class_agreement > 0.85


def test_record_round_trips_through_json(real: ImageData) -> None:
    record = quality(real.images[:100], real.labels[:100], teacher_images=real.images[100:200], resamples=10)
    assert record.teacher is not None
    assert Quality.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    ("field", "value"), [("num_samples", 2000), ("features", "fashion-micro"), ("reference", "train")]
)
def test_distances_under_different_protocols_do_not_compare(of_real: Quality, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r} here"):
        compare(dataclasses.replace(of_real, **{field: value}), of_real)
    assert compare(dataclasses.replace(of_real, distance=3 * of_real.distance), of_real) == pytest.approx(3)


@pytest.mark.wrong_shapes
def test_labels_must_fit(real: ImageData) -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for 5 images"):
        quality(real.images[:5], torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="0 … 9, got 0 … 10"):
        quality(real.images[:5], torch.tensor([0, 1, 2, 3, 10]))


def test_images_of_an_unknown_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"s in \[16, 28\], got \(4, 1, 32, 32\)"):
        quality(torch.zeros(4, 1, 32, 32), torch.zeros(4, dtype=torch.long))


def test_reference_of_another_network_is_refused(real: ImageData) -> None:
    with pytest.raises(ValueError, match="made with 'fashion-micro', the feature network is 'fashion'"):
        quality(real.images[:5], real.labels[:5], load_reference("fashion-micro"))


@pytest.mark.wrong_shapes
def test_gap_to_the_teacher_is_zero_for_itself_and_one_for_strangers(real: ImageData, network: FashionFeatures) -> None:
    itself = teacher_gap(real.images, real.images, network)
    assert (itself.feature_rms, itself.pixel_rms) == (0, 0)
    assert itself.distance == pytest.approx(0, abs=1e-6)
    strangers = teacher_gap(real.images.roll(1, 0), real.images, network)
    assert strangers.feature_rms == pytest.approx(1, abs=0.1)
    assert strangers.pixel_rms == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="pair by pair"):
        teacher_gap(real.images[:3], real.images[:4], network)


def test_floor_falls_with_the_sample_count_and_needs_two_splits(reference: Reference) -> None:
    train = load_reference("fashion", "train")
    floors = [floor_distance(reference, train, count) for count in (500, 1000, 2000, 10_000)]
    assert floors == sorted(floors, reverse=True)
    with pytest.raises(ValueError, match="two splits, got 'test' for both"):
        floor_distance(reference, reference, 100)
    with pytest.raises(ValueError, match=r"2 … 10000 .*got 20000"):
        floor_distance(reference, train, 20_000)
    with pytest.raises(ValueError, match="different feature networks"):
        floor_distance(reference, load_reference("fashion-micro", "train"), 100)


def test_shipped_reference_is_that_of_the_test_images(reference: Reference) -> None:
    from diffusion_opt.datasets import load_fashion_mnist

    made = make_reference(load_features("fashion"), load_fashion_mnist("test"), "test")
    torch.testing.assert_close(made.mean, reference.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.cov, reference.cov, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(made.examples.float(), reference.examples.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.wrong_shapes
def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'validation'"):
        load_reference("fashion", "validation")
