"""The shipped feature networks are what their results file says, and damage is reported by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusion_opt.datasets import CorruptFileError, data_dir, load_fashion_mnist, write_sums
from diffusion_opt.evaluation.features import (
    FEATURES_BY_SIZE,
    FashionFeatures,
    FeatureConfig,
    as_saved,
    embed,
    load_features,
    read_features,
    save_features,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "features.json"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_dir() / "features" / "fashion-micro", tmp_path / "fashion-micro"))


@pytest.mark.parametrize(("size", "name", "at_least"), [(28, "fashion", 0.9), (16, "fashion-micro", 0.86)])
def test_shipped_network_has_the_published_accuracy(size: int, name: str, at_least: float) -> None:
    test = load_fashion_mnist("test", size=size)
    _, logits = embed(load_features(name), test.images)
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    published = next(entry for entry in json.loads(RESULTS.read_text())["networks"] if entry["name"] == name)
    assert accuracy == pytest.approx(published["test_accuracy"], abs=5e-4)
    assert accuracy >= at_least


@pytest.mark.parametrize(("size", "name"), FEATURES_BY_SIZE.items())
def test_network_is_small_frozen_and_named_for_its_size(size: int, name: str) -> None:
    network = load_features(name)
    assert network.config.image_size == size
    assert 100_000 <= sum(p.numel() for p in network.parameters()) <= 300_000
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_features_do_not_depend_on_the_batch(network: FashionFeatures) -> None:
    images = torch.randn(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    together, _ = embed(network, images)
    apart, _ = embed(network, images, batch_size=2)
    assert together.shape == (7, network.num_features)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_saved_images_are_clamped_to_256_levels() -> None:
    levels = torch.arange(256) / 127.5 - 1
    torch.testing.assert_close(as_saved(levels), levels)
    assert as_saved(torch.tensor([-3.0, 7.0])).tolist() == [-1.0, 1.0]
    assert as_saved(torch.linspace(-1, 1, 10_000)).unique().numel() == 256


def test_save_and_read_again_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FashionFeatures(FeatureConfig("fashion", 28, widths=(4, 5, 6, 7, 8), num_features=9)).eval()
    save_features(network, tmp_path)
    write_sums(tmp_path)
    again = read_features(tmp_path)
    images = torch.randn(2, 1, 28, 28)
    assert again.config == network.config
    assert torch.equal(again(images), network(images))


def test_wrong_image_size_names_both_shapes(network: FashionFeatures) -> None:
    with pytest.raises(ValueError, match=r"\(b, 1, 28, 28\), got \(2, 1, 16, 16\)"):
        network(torch.zeros(2, 1, 16, 16))


def test_images_that_are_not_finite_are_refused(network: FashionFeatures) -> None:
    images = torch.zeros(3, 1, 28, 28)
    images[1, 0, 4, 4] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 images hold NaN"):
        embed(network, images)


def test_no_images_are_refused(network: FashionFeatures) -> None:
    with pytest.raises(ValueError, match="0 images"):
        embed(network, torch.zeros(0, 1, 28, 28))


def test_unknown_network_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['fashion', 'fashion-micro'\], got 'inception'"):
        load_features("inception")


def test_altered_weights_are_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is damaged"):
        read_features(copied)


def test_truncated_weights_are_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is damaged.*1,000 bytes"):
        read_features(copied)


def test_missing_reference_is_named(copied: Path) -> None:
    (copied / "reference.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"reference\.safetensors is missing"):
        read_features(copied)


def test_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_features(FashionFeatures(FeatureConfig("fashion", 28)), tmp_path)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "model.safetensors")
    write_sums(tmp_path)
    with pytest.raises(CorruptFileError, match=r"does not fit config\.json"):
        read_features(tmp_path)
