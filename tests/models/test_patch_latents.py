"""Principal components of patches, and the stock autoencoder that computes them."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from diffusion_opt.models.patch_latents import (
    encoder_widths,
    fit,
    packed,
    pixels,
    put_into,
    statistics,
    taken_from,
)

CHANNELS = 6


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Twelve pictures of 48 x 32 pixels with structure: smooth waves in three colors, and some noise."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(12, 3, 6, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(low, (48, 32), mode="bilinear")
    return ((smooth + 0.05 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def autoencoder(pictures: Tensor) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=encoder_widths(CHANNELS),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=48,
        mid_block_add_attention=False,
    ).eval()
    put_into(vae, fit(pictures, CHANNELS))
    return vae


def test_all_components_lose_nothing_and_fewer_lose_exactly_the_smallest_variances(pictures: Tensor) -> None:
    x = pixels(pictures)
    whole = fit(pictures, 192)
    assert torch.allclose(whole.decode(whole.encode(x)), x, atol=1e-5)

    patches = torch.nn.functional.pixel_unshuffle(x, 8).movedim(1, -1).flatten(0, -2).double()
    variances = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0)).flip(0)
    few = fit(pictures, CHANNELS)
    error = (few.decode(few.encode(x)) - x).square().mean() * 192
    assert error == pytest.approx(variances[CHANNELS:].sum().item(), rel=1e-4)


def test_no_random_projection_is_better(pictures: Tensor) -> None:
    x, pca = pixels(pictures), fit(pictures, CHANNELS)
    best = (pca.decode(pca.encode(x)) - x).square().mean()
    for seed in range(5):
        matrix = torch.randn(192, CHANNELS, generator=torch.Generator().manual_seed(seed))
        other = type(pca)(pca.mean, torch.linalg.qr(matrix + 3 * pca.directions).Q, 1.0)
        assert (other.decode(other.encode(x)) - x).square().mean() > best


def test_latents_have_unit_variance_together(pictures: Tensor) -> None:
    z = fit(pictures, CHANNELS).encode(pixels(pictures))
    assert z.square().mean() == pytest.approx(1.0, rel=1e-3)


def test_the_stock_encoder_computes_the_components(pictures: Tensor, autoencoder: AutoencoderKLFlux2) -> None:
    pca, x = fit(pictures, CHANNELS), pixels(pictures[:3])
    with torch.no_grad():
        latents = autoencoder.encode(x).latent_dist
    assert latents.mode().shape == (3, CHANNELS, 6, 4)
    assert torch.allclose(latents.mode(), pca.encode(x), atol=2e-5)
    drawn = latents.sample(torch.Generator().manual_seed(1))
    assert torch.allclose(drawn, latents.mode(), atol=2e-6)


def test_half_precision_weights_change_latents_little(pictures: Tensor, autoencoder: AutoencoderKLFlux2) -> None:
    pca, x = fit(pictures, CHANNELS), pixels(pictures[:3])
    stored = AutoencoderKLFlux2.from_config(autoencoder.config)
    stored.load_state_dict({name: value.half().float() for name, value in autoencoder.state_dict().items()})
    with torch.no_grad():
        error = stored.eval().encode(x).latent_dist.mode() - pca.encode(x)
    assert 0 < error.abs().max() < 0.02


def test_components_are_read_back_from_the_encoder(pictures: Tensor, autoencoder: AutoencoderKLFlux2) -> None:
    pca, found, x = fit(pictures, CHANNELS), taken_from(autoencoder), pixels(pictures)
    assert torch.allclose(found.encode(x), pca.encode(x), atol=1e-4)
    assert torch.allclose(found.directions, pca.directions, atol=1e-5)


def test_statistics_center_tempered_latents_of_unit_variance(pictures: Tensor) -> None:
    pca = fit(pictures, CHANNELS)
    mean, variance = statistics(pca, pictures)
    rows = packed(pca.encode(pixels(pictures))).movedim(1, -1).flatten(0, -2)
    normalized = (rows - mean) / variance.sqrt()
    assert torch.allclose(normalized.mean(0), torch.zeros(4 * CHANNELS), atol=1e-4)
    assert normalized.square().mean() == pytest.approx(1.0, rel=1e-3)
    ratio = rows.std(0, correction=0).log().diff() / variance.log().diff()  # variance goes as the deviation
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-2)


@pytest.mark.wrong_shapes
def test_sizes_that_cannot_be_are_refused(pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"1 … 192 channels, got 193"):
        fit(pictures, 193)
    with pytest.raises(ValueError, match=r"multiples of 8, got \(48, 30\)"):
        fit(pictures[..., :30], CHANNELS)
    other = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4)
    with pytest.raises(ValueError, match=r"block_out_channels=\(12, 48, 48, 48\)"):
        put_into(other, fit(pictures, 4))
