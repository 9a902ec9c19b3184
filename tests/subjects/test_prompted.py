"""Any pipeline with prompts as a subject: its own passes, bit for bit; its own pictures; refusals that say why."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.datasets import ImageData
from diffusion_opt.flow import ALL_TIMES
from diffusion_opt.subjects import PromptedPipeline, Run
from diffusion_opt.subjects.recording import watched

FAMILIES = ("flux2-klein", "flux2-dev", "sd3", "wan", "ltx", "ltx2-cfg", "qwen-image")
MORE = ("flux", "sana", "hunyuan-video", "wan2.2-5b")


def plain_run(name: str) -> Run:
    """The call that suits the pipeline, with no other guidance than that of two passes."""
    run = tiny_run(name)
    if not name.startswith("ltx2"):
        return run
    plain = {"audio_guidance_scale": run.guidance_scale, "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}
    return replace(run, arguments={**run.arguments, **plain})


def watched_run(subject: PromptedPipeline, steps: int = 3):
    """The velocities, with guidance, and the samples of one call of the pipeline, and what it made."""
    with watched(subject.pipe, subject.transformer) as tape:
        call = subject.run.call([0], num_inference_steps=steps, output_type="pt", return_dict=False)
        made = subject.pipe(**call)[0]
    streams = len(subject.network.streams)
    grouped = [tape.steps[i : i + streams] for i in range(0, len(tape.steps), streams)]
    join = subject.network.join
    return [(join([v for v, _ in step]), join([x for _, x in step])) for step in grouped], made


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_velocities_and_pictures_are_those_of_the_pipeline(name: str) -> None:
    subject = PromptedPipeline(tiny_pipeline(name), plain_run(name))
    steps, made = watched_run(subject)
    teacher, condition = subject.guided(subject.default_guidance), subject.conditions[torch.tensor([0])]
    for k, (velocity, x) in enumerate(steps):
        mine = teacher(x, torch.tensor([1 - k / 3]), condition)
        torch.testing.assert_close(mine, velocity.float(), rtol=1e-4, atol=1e-4)
    velocity, x = steps[-1]
    decoded = subject.decode(x - velocity / 3)
    assert (decoded - torch.as_tensor(made)).abs().mean() < 1e-3  # a random decoder makes much of the last bit


def test_a_batch_is_its_samples_and_prompts_matter() -> None:
    subject = PromptedPipeline(tiny_pipeline("ltx2-cfg"), plain_run("ltx2-cfg"))
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, *subject.sample_shape, generator=generator), torch.tensor([0.2, 0.5, 0.9])
    condition = subject.conditions[torch.tensor([0, 1, 0])]
    whole = subject.network(x, t, condition)
    for i in range(3):
        part = slice(i, i + 1)
        torch.testing.assert_close(
            subject.network(x[part], t[part], condition[part]), whole[part], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(subject.network(x, t, condition.drop()), whole, atol=1e-4)
    video, sound = subject.network.split(x)
    assert torch.equal(subject.network.join([video, sound]), x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wan2.2", "WanPipeline has two networks.* Take a model with one"),
        ("sdxl", "denoises with a UNet"),
        ("pixart", "predicts epsilon"),
        ("flux2-klein-reference", "Flux2KleinPipeline shows its transformer a picture .image. .*distill the pipeline"),
        ("wan-i2v", "WanImageToVideoPipeline shows its transformer a picture"),
        ("ltx-i2v", "shows its transformer a picture"),
        ("sd3-img2img", "begins at a noised picture"),
        ("z-image", "ZImageTransformer2DModel takes a list of samples"),
        ("hunyuan-video-1.5", "mixes its passes by a guider .ClassifierFreeGuidance."),
    ],
)
def test_what_cannot_be_followed_is_refused_and_left_as_it_was(name: str, message: str) -> None:
    pipe = tiny_pipeline(name)
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match=message):
        PromptedPipeline(pipe, tiny_run(name))
    assert pipe.scheduler is scheduler
    network = getattr(pipe, "transformer", None)
    assert network is None or not (network._forward_pre_hooks or network._forward_hooks)


@pytest.fixture(scope="module")
def wan() -> PromptedPipeline:
    return PromptedPipeline(tiny_pipeline("wan"), tiny_run("wan"), name="wan")


def test_its_identity_is_weights_prompts_and_call(wan: PromptedPipeline) -> None:
    again = PromptedPipeline(tiny_pipeline("wan"), tiny_run("wan", seed=5, num_inference_steps=3), name="elsewhere")
    assert {**again.identity(), "name": ""} == {**wan.identity(), "name": ""}
    larger = PromptedPipeline(tiny_pipeline("wan"), tiny_run("wan", height=64))
    other = PromptedPipeline(tiny_pipeline("wan"), tiny_run("wan", prompts=("a dog", "a cat")))
    for different in (larger, other):
        assert different.identity()["conditions"] != wan.identity()["conditions"]
    pipe: DiffusionPipeline = tiny_pipeline("wan")
    with torch.no_grad():
        next(pipe.transformer.blocks[0].parameters()).add_(1)
    assert PromptedPipeline(pipe, tiny_run("wan")).identity()["model"] != wan.identity()["model"]


def test_what_it_cannot_give_is_refused(wan: PromptedPipeline) -> None:
    assert "has no place for the length of a jump" in wan.refuses("two times", needs_data=False)
    with pytest.raises(ValueError, match="wan was given none: give latents, or pictures with captions"):
        wan.with_data()
    with pytest.raises(ValueError, match="the model knows 2"):
        wan.network(torch.zeros(1, *wan.sample_shape), torch.ones(1), replace(wan.conditions, num=5)[torch.tensor([1])])
    with pytest.raises(ValueError, match=r"pass condition.drop\(\)"):
        wan.network(torch.zeros(1, *wan.sample_shape), torch.ones(1), None)
    dev = PromptedPipeline(tiny_pipeline("flux2-dev"), tiny_run("flux2-dev"))
    with pytest.raises(ValueError, match="guidance is an input of Flux2Transformer2DModel, set to 4 by the run"):
        dev.guided(3.0)
    with pytest.raises(ValueError, match="guidance is an input"):
        dev.guided(4.0, (0.2, 0.8))
    assert dev.guided(4.0, ALL_TIMES) is dev.network


def test_other_guidance_is_refused_where_it_is_asked_for_and_named_where_it_is_the_default() -> None:
    pipe = tiny_pipeline("ltx2")
    with pytest.raises(ValueError, match=r"stg_scale=2.0 is other guidance"):
        PromptedPipeline(pipe, replace(tiny_run("ltx2"), arguments={"stg_scale": 2.0}))
    with pytest.warns(UserWarning, match=r"guides by .*stg_scale=1.0.*; the student is taught two passes mixed by 4"):
        PromptedPipeline(pipe, replace(tiny_run("ltx2"), arguments={"max_sequence_length": 32}))


def test_latents_must_be_of_its_prompts_and_shape(wan: PromptedPipeline) -> None:
    latents = torch.zeros(4, *wan.sample_shape)
    labels = torch.tensor([0, 1, 1, 0])
    with_data = PromptedPipeline(wan.pipe, wan.run, data=ImageData(latents, labels, wan.run.prompts))
    assert len(with_data.with_data(num=3).data) == 3
    with pytest.raises(ValueError, match="the samples are of other prompts than the run's"):
        PromptedPipeline(wan.pipe, wan.run, data=ImageData(latents, labels, ("a", "b")))
    with pytest.raises(ValueError, match=r"a sample is .*, the data has"):
        PromptedPipeline(wan.pipe, wan.run, data=ImageData(latents[..., :2], labels, wan.run.prompts))
