"""A run says once what is asked of a pipeline, and each sample is the same in every batch."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    StableDiffusionXLPipeline,
    WanImageToVideoPipeline,
)
from PIL import Image
from small_pipelines import small_pipeline
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.models.student_scheduler import StudentScheduler
from diffusion_opt.subjects import Run, denoisers


def test_class_conditional_pipelines_bring_their_own_prompts() -> None:
    run = Run.for_pipeline(small_pipeline(), num_inference_steps=2)
    assert len(run.prompts) == 10
    assert run.settings == {"num_inference_steps": 2}


def test_a_sample_does_not_depend_on_the_batch_it_is_made_in() -> None:
    pipe = small_pipeline()
    run = Run(("0", "1", "2"), num_inference_steps=2, guidance_scale=2.0, seed=5)
    together = run.generate(pipe, range(4))
    alone = torch.cat([run.generate(pipe, [index]) for index in range(4)])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(together[0], together[3])  # the prompt comes again, the noise does not


def test_overrides_take_the_place_of_settings() -> None:
    call = Run("a cat", num_inference_steps=4, negative_prompt="bad").call([0, 1], num_inference_steps=7)
    assert call["num_inference_steps"] == 7
    assert call["negative_prompt"] == ["bad", "bad"]
    assert call["prompt"] == ["a cat", "a cat"]


def test_one_sample_is_asked_for_by_plain_values() -> None:
    call = Run("a cat", negative_prompt="bad").call([3])
    assert call["prompt"] == "a cat"
    assert call["negative_prompt"] == "bad"
    assert call["generator"].initial_seed() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": "a", "height": 0}, "height must be at least 1, got 0"),
        ({"prompts": "a", "arguments": {"height": 8}}, r"give it as Run\(height=…\)"),
        ({"prompts": "a", "arguments": {"generator": 1}}, "a Run sets it itself"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**settings)


def test_a_run_is_checked_against_the_call_of_the_pipeline() -> None:
    pipe = object.__new__(WanImageToVideoPipeline)
    with pytest.raises(ValueError, match="cannot be called without image"):
        Run("a cat").check(pipe)
    with pytest.raises(ValueError, match="takes no 'mask_image'"):
        Run("a cat", arguments={"image": 1, "mask_image": 2}).check(pipe)
    Run("a cat", num_frames=9, arguments={"image": 1}).check(pipe)


def test_the_fingerprint_knows_pictures_and_ignores_batches() -> None:
    black, white = Image.new("RGB", (4, 6)), Image.new("RGB", (4, 6), "white")
    one = Run("a", arguments={"image": black})
    assert one.fingerprint() == Run("a", batch_size=3, arguments={"image": black.copy()}).fingerprint()
    assert one.fingerprint() != Run("a", arguments={"image": white}).fingerprint()
    assert one.fingerprint() != Run("a", seed=1, arguments={"image": black}).fingerprint()
    with pytest.raises(ValueError, match="cannot say what object is"):
        Run("a", arguments={"image": object()}).fingerprint()


def test_denoisers_are_all_the_networks_that_take_steps() -> None:
    pipe = small_pipeline()
    assert denoisers(pipe) == {"transformer": pipe.transformer}

    pipe.register_modules(transformer_2=pipe.transformer)
    assert list(denoisers(pipe)) == ["transformer", "transformer_2"]


def test_a_pipeline_with_a_unet_is_refused_with_the_reason() -> None:
    pipe = object.__new__(StableDiffusionXLPipeline)
    pipe.unet = "network"
    with pytest.raises(ValueError, match="denoises with a UNet"):
        denoisers(pipe)
    with pytest.raises(ValueError, match="no transformer that denoises"):
        denoisers(object.__new__(StableDiffusionXLPipeline))


def test_noise_that_no_seed_repeats_is_refused() -> None:
    """FLUX.2's pipeline hands no generator to its scheduler; Sana's does, and so does ours."""
    stock = tiny_pipeline("flux2-klein")
    run = tiny_run("flux2-klein")
    run.check(stock)
    for scheduler in (FlowMatchLCMScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)):
        stock.scheduler = scheduler
        with pytest.raises(ValueError, match=r"adds noise at each step, and Flux2KleinPipeline does not hand it"):
            run.check(stock)
    stock.scheduler = StudentScheduler([[1.0, 0.5]], renoise=True)
    run.check(stock)
    own = small_pipeline()
    own.scheduler = FlowMatchLCMScheduler()
    Run.for_pipeline(own)
