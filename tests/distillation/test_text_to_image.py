"""Training a small text-to-image pipeline: it learns, and an interrupted run goes on bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from diffusion_opt.datasets import CaptionedDataSet, CaptionedPictures
from diffusion_opt.distillation import text_to_image
from diffusion_opt.distillation.text_to_image import (
    PIPELINE,
    VAE,
    World,
    begin,
    make_autoencoder,
    make_text_to_image_teacher,
    trained_autoencoder,
    world_named,
)
from diffusion_opt.models import load
from diffusion_opt.models.text_encoder import TextEncoderConfig
from diffusion_opt.models.text_to_image import TextToImageConfig
from diffusion_opt.training import TrainConfig

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
CONFIG = TrainConfig(steps=6, batch_size=4, warmup_steps=1, learning_rate=3e-3, ema_decay=0.5, log_every=1)
SIZES = TextToImageConfig(
    image_size=32,
    channels=4,
    num_heads=1,
    head_dim=16,
    num_double=1,
    num_single=1,
    text=TextEncoderConfig(width=16, layers=1, heads=2, out_layers=(0, 1), max_tokens=4, vocabulary=300),
    decoder_widths=(4, 4, 8, 8),
    steps=2,
)


def flat_pictures(count: int, seed: int, split: str, cache: Path) -> CaptionedPictures:
    """Pictures of one color each, with a lighter square."""
    names = [list(COLORS)[i % 3] for i in range(count)]
    pictures = torch.tensor([COLORS[name] for name in names], dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 32, 32)
    pictures[:, :, 8:20, 4:16] += 35
    return CaptionedPictures(pictures, lambda index, generator: f"a {names[index]} one")


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CaptionedDataSet("flat", 32, flat_pictures)
    monkeypatch.setattr(text_to_image, "world_named", lambda name: (data, World(SIZES, 12, CONFIG, CONFIG)))


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_an_interrupted_teacher_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pipe, whole = make_text_to_image_teacher(begin("flat", tmp_path, tmp_path / "a/start"), CONFIG, tmp_path / "a")
    assert whole.finished

    class Stop(Exception):
        pass

    begun = begin("flat", tmp_path, tmp_path / "b/start")
    caption, seen = begun.data.caption, []

    def stopping(index: int, generator: torch.Generator) -> str:
        seen.append(index)
        if len(seen) > 14:
            raise Stop
        return caption(index, generator)

    object.__setattr__(begun.data, "caption", stopping)
    with pytest.raises(Stop):
        make_text_to_image_teacher(begun, replace(CONFIG, checkpoint_seconds=0), tmp_path / "b")
    again = begin("flat", tmp_path, tmp_path / "b/start")
    resumed, result = make_text_to_image_teacher(again, CONFIG, tmp_path / "b")
    assert result.step == 6
    assert torch.equal(weights(resumed.transformer), weights(pipe.transformer))
    assert torch.equal(weights(resumed.text_encoder), weights(pipe.text_encoder))
    before = load(tmp_path / "a/start", dtype="float32")
    assert not torch.equal(weights(before.text_encoder), weights(pipe.text_encoder))
    images = load(tmp_path / "b" / PIPELINE, dtype="float32")(prompt="red one", output_type="pt").images
    assert images.shape == (1, 3, 32, 32)


def test_the_decoder_learns_and_the_teacher_takes_it(tmp_path: Path) -> None:
    config = TrainConfig(steps=16, batch_size=2, warmup_steps=2, learning_rate=5e-3, ema_decay=0.5, log_every=4)
    _, result = make_autoencoder(begin("flat", tmp_path, tmp_path / "v/start"), config, tmp_path / "v")
    assert result.history[-1]["psnr"] > result.history[0]["psnr"] + 1
    begun = begin("flat", tmp_path, tmp_path / "t/start")
    pipe, _ = make_text_to_image_teacher(begun, CONFIG, tmp_path / "t", tmp_path / "v" / VAE)
    trained = AutoencoderKLFlux2.from_pretrained(tmp_path / "v" / VAE)
    assert torch.equal(weights(pipe.vae.decoder), weights(trained.decoder))

    trained.bn.running_mean += 0.1
    trained.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has other latents \(mean differ\)"):
        trained_autoencoder(tmp_path / "other", begun.pipe.vae)


def test_a_start_brings_its_words_and_weights(tmp_path: Path) -> None:
    make_text_to_image_teacher(begin("flat", tmp_path, tmp_path / "a/start"), CONFIG, tmp_path / "a")
    first = load(tmp_path / "a" / PIPELINE, dtype="float32")
    begun = begin("flat", tmp_path, tmp_path / "b/start", start=tmp_path / "a" / PIPELINE)
    assert torch.equal(weights(begun.pipe.transformer), weights(first.transformer))
    assert begun.pipe.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"no FLUX\.2 with an autoencoder and a text encoder"):
        begin("flat", tmp_path, tmp_path / "c/start", start="fashion-micro")


def test_worlds_are_found_by_their_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data_set, world = world_named("portraits")
    assert world.config.image_size == data_set.image_size == 128
    with pytest.raises(ValueError, match="no captioned pictures are called 'portrait'; there are portraits"):
        world_named("portrait")
