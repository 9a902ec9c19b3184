"""The pipeline as a diffusers user meets it: call forms, defaults, callbacks, outputs, saving, the stock pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_opt.models import ClassEmbedder, FlowMatchAdamsBashforthScheduler, PixelShuffleVAE, TinyFlux2Pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt=None, **kwargs) -> torch.Tensor:
    kwargs = {"num_inference_steps": 3, "generator": seeded(), "output_type": "pt"} | kwargs
    return pipe(prompt, **kwargs).images


@given(
    batch=st.integers(1, 3), channels=st.integers(1, 3), rows=st.integers(1, 4), columns=st.integers(1, 5),
    depth=st.integers(1, 3),
)  # fmt: skip
def test_pixel_shuffle_is_exactly_invertible(batch, channels, rows, columns, depth):
    vae = PixelShuffleVAE(in_channels=channels, block_out_channels=(1,) * depth)
    factor = 2 ** (depth - 1)
    x = torch.randn(batch, channels, rows * factor, columns * factor, generator=seeded())
    z = vae.encode(x).latents
    assert z.shape == (batch, channels * factor**2, rows, columns)
    assert torch.equal(vae.decode(z).sample, x) and torch.equal(vae.decode(z, return_dict=False)[0], x)


def test_pixel_shuffle_has_nothing_to_learn():
    assert list(PixelShuffleVAE().parameters()) == []


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [("bag", [8]), ("Ankle Boot", [9]), ("7", [7]), (0, [0]), ("", [10]), (["coat", 4, "4", ""], [4, 4, 4, 10])],
)
def test_labels_by_name_number_or_nothing(pipe, prompt, labels):
    assert pipe.class_embedder.labels(prompt).tolist() == labels
    expected = pipe.class_embedder.table.weight[labels][:, None]
    assert torch.equal(pipe.encode_prompt(prompt)[0], expected)


def test_capital_letters_in_class_names_do_not_matter():
    assert ClassEmbedder(class_names=("Golden Retriever", "tabby"), dim=4).labels(["golden retriever"]).tolist() == [0]


@pytest.mark.parametrize("prompt", ["hat", "10", -1, 10, True, ["bag", "hat"]])
def test_unknown_prompt(pipe, prompt):
    with pytest.raises(ValueError, match=r"unknown prompt .*: use a class number 0 … 9 or one of t-shirt, trouser"):
        pipe(prompt, num_inference_steps=1)


def test_no_prompt_at_all(pipe):
    with pytest.raises(ValueError, match="empty list of prompts"):
        pipe([], num_inference_steps=1)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        pipe(num_inference_steps=1)


def test_a_name_its_number_and_a_list_are_the_same_picture(pipe):
    name = draw(pipe, "trouser")
    assert name.shape == (1, 1, 16, 16) and 0 <= name.min() < name.max() <= 1
    for prompt in (1, "1", ["trouser"], [1]):
        assert torch.equal(draw(pipe, prompt), name)
    assert not torch.equal(draw(pipe, "bag"), name)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_embeddings_instead_of_a_prompt(pipe, guidance_scale):
    prompts = ["bag", "coat", "dress"]
    expected = draw(pipe, prompts, guidance_scale=guidance_scale)
    embeds = pipe.encode_prompt(prompts)[0]
    found = draw(pipe, prompt_embeds=embeds, guidance_scale=guidance_scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pictures_for_each_prompt_lie_side_by_side(pipe):
    noise = torch.randn(1, 16, 4, 4, generator=seeded()).expand(4, -1, -1, -1)
    images = draw(pipe, ["bag", "coat"], num_images_per_prompt=2, latents=noise, guidance_scale=2.0)
    assert torch.equal(images[0], images[1]) and torch.equal(images[2], images[3])
    assert not torch.equal(images[1], images[2])


def test_generator_makes_it_repeatable(pipe):
    assert torch.equal(draw(pipe, "bag"), draw(pipe, "bag"))
    assert not torch.equal(draw(pipe, "bag"), draw(pipe, "bag", generator=seeded(1)))


def test_one_generator_a_picture_makes_it_independent_of_the_batch(pipe):
    batch = draw(pipe, ["bag", "coat"], generator=[seeded(1), seeded(2)])
    torch.testing.assert_close(batch[1:], draw(pipe, "coat", generator=[seeded(2)]), rtol=0, atol=1e-6)


def test_latents_are_the_noise_of_the_generator(pipe):
    noise = torch.randn(2, 16, 4, 4, generator=seeded())
    assert torch.equal(draw(pipe, ["bag", "coat"], latents=noise, generator=None), draw(pipe, ["bag", "coat"]))


def test_output_types_show_the_same_picture(pipe):
    pt, array, pil, latent = (draw(pipe, ["bag", "coat"], output_type=kind) for kind in ("pt", "np", "pil", "latent"))
    assert array.shape == (2, 16, 16, 1)
    np.testing.assert_array_equal(array[..., 0], pt[:, 0].numpy())
    assert all(isinstance(image, Image.Image) and image.mode == "L" and image.size == (16, 16) for image in pil)
    np.testing.assert_allclose(np.asarray(pil[1]) / 255, array[1, ..., 0], atol=0.51 / 255)
    assert latent.shape == (2, 4, 8, 8)
    decoded = pipe.vae.decode(latent).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pt, rtol=0, atol=1e-6)
    assert torch.equal(pipe("bag", num_inference_steps=3, generator=seeded(), return_dict=False, output_type="pt")[0],
                       draw(pipe, "bag"))  # fmt: skip


def test_callback_is_called_once_a_step_and_may_change_the_latents(pipe):
    seen = []

    def erase(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep))))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = draw(pipe, "bag", num_inference_steps=4, callback_on_step_end=erase)
    assert seen == [(0, 1000), (1, 750), (2, 500), (3, 250)]
    assert (images == 0.5).all()


def test_progress_bar_counts_steps_and_can_be_turned_off(pipe, capsys):
    pipe("bag", num_inference_steps=4)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe("bag", num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err


def test_steps_and_guidance_default_to_those_of_the_weights(make_pipe, count_calls):
    pipe = make_pipe(default_steps=5, default_guidance=2.5)
    calls = count_calls(pipe.transformer)
    images = pipe("bag", generator=seeded(), output_type="pt").images
    assert len(calls) == 10 and pipe.num_timesteps == 5 and pipe.guidance_scale == 2.5
    assert torch.equal(images, draw(pipe, "bag", num_inference_steps=5, guidance_scale=2.5))
    assert not torch.equal(images, draw(pipe, "bag", num_inference_steps=5, guidance_scale=1.0))


def test_distilled_weights_take_one_pass_a_step_whatever_the_guidance(make_pipe, count_calls):
    pipe = make_pipe(is_distilled=True)
    calls = count_calls(pipe.transformer)
    images = draw(pipe, "bag", guidance_scale=3.0)
    assert len(calls) == 3
    assert torch.equal(images, draw(pipe, "bag", guidance_scale=1.0))


@pytest.mark.parametrize("second_order", [False, True])
def test_saved_and_opened_again_it_draws_the_same_bits(make_pipe, tmp_path, second_order):
    pipe = make_pipe(default_steps=7, default_guidance=1.5, is_distilled=False)
    if second_order:
        pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    opened = TinyFlux2Pipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert type(opened.scheduler) is type(pipe.scheduler)
    assert (opened.config.default_steps, opened.config.default_guidance) == (7, 1.5)
    for part in ("transformer", "class_embedder", "vae"):
        saved, loaded = (getattr(p, part).state_dict() for p in (pipe, opened))
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert torch.equal(
        draw(opened, ["bag", 3], num_inference_steps=None), draw(pipe, ["bag", 3], num_inference_steps=None)
    )
    assert (
        not list(tmp_path.rglob("*.bin"))
        and json.loads((tmp_path / "model_index.json").read_text())["default_steps"] == 7
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_stock_klein_pipeline_opens_the_folder_and_draws_the_same(pipe, tmp_path, guidance_scale):
    pipe.save_pretrained(tmp_path)
    stock = Flux2KleinPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert type(stock) is Flux2KleinPipeline
    stock.set_progress_bar_config(disable=True)
    prompts = ["bag", "coat"]
    embeds, null = (pipe.encode_prompt(p)[0] for p in (prompts, ["", ""]))
    images = stock(
        prompt_embeds=embeds, negative_prompt_embeds=null, height=16, width=16, num_inference_steps=3,
        guidance_scale=guidance_scale, generator=seeded(), output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(images, draw(pipe, prompts, guidance_scale=guidance_scale))


def test_other_sizes_than_the_trained_one(pipe):
    assert draw(pipe, "bag", height=8, width=24).shape == (1, 1, 8, 24)
