"""A whole small FLUX.2 in the stock class: saved, opened by anyone, and the same to the bit."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from small_pipelines import fill
from torch import Tensor

from diffusion_opt.flow import sampling_times
from diffusion_opt.models import load
from diffusion_opt.models.patch_latents import fit, pixels, statistics
from diffusion_opt.models.text_encoder import TextEncoderConfig, build_tokenizer
from diffusion_opt.models.text_to_image import TextToImageConfig, TextVelocity, build_text_to_image, prompt_condition

SMALL = TextToImageConfig(
    image_size=32,
    channels=4,
    num_heads=2,
    head_dim=16,
    num_double=1,
    num_single=1,
    text=TextEncoderConfig(width=16, layers=2, heads=2, out_layers=(1, 2), max_tokens=6),
    decoder_widths=(4, 8, 8, 8),
    steps=3,
    guidance=2.0,
)
PROMPTS = ["red hair", "a toon face", "blue"]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def pipe(pictures: Tensor) -> Flux2KleinPipeline:
    pca = fit(pictures, SMALL.channels)
    made = build_text_to_image(SMALL, pca, statistics(pca, pictures), build_tokenizer(PROMPTS, 400))
    fill(made.transformer, 0.2)
    made.set_progress_bar_config(disable=True)
    return made


def generated(pipe: DiffusionPipeline, **call: object) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt=PROMPTS, generator=generator, output_type="pt", **call).images


def test_stock_class_opens_the_folder_and_gives_the_same_bits(pipe: Flux2KleinPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    call = json.loads((tmp_path / "call.json").read_text())
    assert call == SMALL.call
    stock = Flux2KleinPipeline.from_pretrained(tmp_path)
    opened = load(tmp_path, dtype="float32")
    for other in (stock, opened):
        other.set_progress_bar_config(disable=True)
    expected = generated(pipe)
    assert expected.shape == (3, 3, 32, 32)
    assert expected.std() > 0.01
    assert torch.equal(generated(stock, **call), expected)
    assert torch.equal(generated(opened), expected)
    assert not torch.equal(generated(opened, num_inference_steps=2), expected)


def test_velocity_is_what_the_stock_loop_integrates(pipe: Flux2KleinPipeline) -> None:
    network = TextVelocity(pipe, SMALL.text.out_layers).eval()
    condition = prompt_condition(pipe.tokenizer, PROMPTS, SMALL.text.max_tokens)
    x = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t, r in pairwise(sampling_times(3, SMALL.shift).tolist()):
            times = torch.full((3,), t)
            plain, conditioned = network(x, times, condition.drop()), network(x, times, condition)
            x = x + (r - t) * (plain + SMALL.guidance * (conditioned - plain))
        std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        latents = x * std[:, None, None] + pipe.vae.bn.running_mean[:, None, None]
        images = pipe.vae.decode(pipe._unpatchify_latents(latents)).sample
    assert torch.allclose(generated(pipe), (images / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_pictures_are_normalized_as_the_stock_pipeline_does(pipe: Flux2KleinPipeline, pictures: Tensor) -> None:
    from diffusion_opt.datasets import CaptionedPictures
    from diffusion_opt.distillation.text_to_image import LatentPictures
    from diffusion_opt.models.patch_latents import taken_from

    data = CaptionedPictures(pictures, lambda index, generator: PROMPTS[index % 3])
    samples = LatentPictures(data, taken_from(pipe.vae), pipe.vae.bn, pipe.tokenizer, 6)
    drawn, condition = samples.draw(4, torch.Generator().manual_seed(5))
    indices = data.indices(4, torch.Generator().manual_seed(5))
    with torch.no_grad():
        stock = pipe._encode_vae_image(pixels(pictures[indices]), generator=torch.Generator())
    assert torch.allclose(drawn, stock, atol=1e-4)
    assert torch.equal(condition.ids, prompt_condition(pipe.tokenizer, [PROMPTS[i % 3] for i in indices], 6).ids)


def test_a_dropped_prompt_is_the_empty_one(pipe: Flux2KleinPipeline) -> None:
    condition = prompt_condition(pipe.tokenizer, PROMPTS, 6)
    empty = prompt_condition(pipe.tokenizer, [""], 6)
    dropped = condition.drop(torch.tensor([True, False, True]))
    assert torch.equal(dropped.ids[[0, 2]], empty.ids.expand(2, -1))
    assert torch.equal(dropped.mask[1], condition.mask[1])
    assert torch.equal(condition.drop().ids, empty.ids.expand(3, -1))
    assert torch.equal(condition[1:].ids, condition.ids[1:])


def test_fresh_weights_are_the_zero_velocity(pictures: Tensor) -> None:
    pca = fit(pictures, SMALL.channels)
    fresh = build_text_to_image(SMALL, pca, statistics(pca, pictures), build_tokenizer(PROMPTS, 400), seed=1)
    network = TextVelocity(fresh, SMALL.text.out_layers)
    velocity = network(
        torch.randn(2, 16, 2, 2), torch.tensor([0.3, 0.9]), prompt_condition(fresh.tokenizer, PROMPTS[:2], 6)
    )
    assert torch.equal(velocity, torch.zeros(2, 16, 2, 2))
    with pytest.raises(ValueError, match=r"pass condition\.drop"):
        network(torch.randn(2, 16, 2, 2), torch.tensor([0.3, 0.9]))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16 pixels, a token, got 40"):
        TextToImageConfig(image_size=40)
    with pytest.raises(ValueError, match=r"multiple of 8 .*got 12"):
        TextToImageConfig(head_dim=12)
