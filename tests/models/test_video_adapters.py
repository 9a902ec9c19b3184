"""Wan and LTX-2 as velocity models: what the transformer of diffusers gives when called as its pipeline calls it."""

import pytest
import torch
from small_transformers import TEXT_DIM, TEXT_TOKENS, family_pass, small_transformer
from torch import Tensor

from diffusion_opt.flow import ClassCondition, Guided
from diffusion_opt.models import TokenCondition
from diffusion_opt.models.ltx2 import LTX2Velocity
from diffusion_opt.models.prompt_table import PromptTable, text_of
from diffusion_opt.models.wan import WanVelocity

TIMES = torch.tensor([0.25, 0.75])


def condition(dim: int = TEXT_DIM) -> TokenCondition:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(3, TEXT_TOKENS, dim, generator=generator)
    return TokenCondition(tokens[:2], tokens[2:])


@pytest.fixture(scope="module")
def wan() -> WanVelocity:
    return WanVelocity(small_transformer("wan"))


@pytest.fixture(scope="module")
def ltx2() -> LTX2Velocity:
    return LTX2Velocity(small_transformer("ltx2"), video_shape=(8, 3, 2, 2), audio_shape=(7, 4))


def video_and_sound() -> tuple[Tensor, Tensor]:
    given = family_pass("ltx2", 0.5)
    return given["hidden_states"].transpose(1, 2).unflatten(2, (3, 2, 2)), given["audio_hidden_states"]


def test_wan_gets_times_to_1000_and_latents_as_they_are(wan):
    given, text = family_pass("wan", 0.25), condition()
    x = given["hidden_states"]
    for item, time in enumerate(TIMES):
        timestep = torch.full((1,), 1000 * float(time))
        expected = wan.transformer(x[item : item + 1], timestep, text.tokens[item : item + 1], return_dict=False)[0]
        torch.testing.assert_close(wan(x, TIMES, text)[item : item + 1], expected, rtol=1e-4, atol=1e-5)


def test_ltx2_packs_both_streams_as_its_pipeline_does(ltx2):
    given = family_pass("ltx2", 0.75)
    video, sound = video_and_sound()
    text = condition(2 * TEXT_DIM)
    first, second = text.tokens.chunk(2, dim=-1)
    given |= {"encoder_hidden_states": first, "audio_encoder_hidden_states": second}
    expected_video, expected_sound = ltx2.transformer(**given, sigma=given["timestep"])
    found = ltx2(ltx2.join(video, sound), torch.full((2,), 0.75), text)
    video_velocity, sound_velocity = ltx2.split(found)
    torch.testing.assert_close(video_velocity.flatten(2).transpose(1, 2), expected_video)
    torch.testing.assert_close(sound_velocity, expected_sound)
    assert found.shape == (2, *ltx2.sample_shape) == (2, 8 * 3 * 2 * 2 + 7 * 4)


def test_ltx2_split_is_the_inverse_of_join(ltx2):
    video, sound = video_and_sound()
    again = ltx2.split(ltx2.join(video, sound))
    assert torch.equal(again[0], video) and torch.equal(again[1], sound)


@pytest.mark.parametrize("family", ["wan", "ltx2"])
def test_times_and_text_matter_item_by_item_and_gradients_arrive(family, wan, ltx2, request):
    model = request.getfixturevalue(family)
    text = condition(TEXT_DIM if family == "wan" else 2 * TEXT_DIM)
    shape = (2, 4, 3, 4, 4) if family == "wan" else (2, *ltx2.sample_shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    both = model(x, TIMES, text)
    other = model(x, torch.tensor([0.25, 0.5]), text)
    torch.testing.assert_close(both[0], other[0])
    assert not torch.allclose(both[1], other[1], atol=1e-4)
    assert not torch.allclose(both, model(x, TIMES, text.drop()), atol=1e-4)
    both.square().sum().backward()
    assert x.grad.flatten(1).any(dim=1).all()


def test_prompts_are_classes(wan):
    text = condition()
    prompts = PromptTable(text.tokens, text.null)
    model = WanVelocity(wan.transformer, prompts)
    x = family_pass("wan", 0.25)["hidden_states"]
    classes = ClassCondition(torch.tensor([1, 0]), 2)
    assert torch.equal(model(x, TIMES, classes), wan(x, TIMES, text[[1, 0]]))
    assert torch.equal(model(x, TIMES, classes.drop()), wan(x, TIMES, text.drop()))
    assert torch.equal(Guided(model, 3.0)(x, TIMES, classes), Guided(wan, 3.0)(x, TIMES, text[[1, 0]]))
    assert prompts.num_prompts == 2 and not prompts.state_dict()


def test_clear_errors(wan, ltx2):
    x, text = family_pass("wan", 0.25)["hidden_states"], condition()
    for model, sample in ((wan, x), (ltx2, torch.zeros(2, *ltx2.sample_shape))):
        with pytest.raises(ValueError, match="knows one time and has no slot"):
            model(sample, TIMES, text, r=TIMES)
        with pytest.raises(ValueError, match="always has a text stream"):
            model(sample, TIMES)
    with pytest.raises(ValueError, match=r"\(3, 4, 3\) are no multiple of the patch \(1, 2, 2\)"):
        wan(x[..., :3], TIMES, text)
    with pytest.raises(ValueError, match="has 124 numbers, got 5"):
        ltx2(torch.zeros(2, 5), TIMES, text)
    with pytest.raises(ValueError, match="a sound token has 4 numbers here, got 6"):
        LTX2Velocity(ltx2.transformer, (8, 3, 2, 2), (7, 6))
    with pytest.raises(ValueError, match="one of 4 prompts, and the model has no table"):
        text_of(ClassCondition(torch.tensor([0]), 4), None)
    with pytest.raises(ValueError, match="one of 4 prompts, and the model has a table of 2"):
        text_of(ClassCondition(torch.tensor([0]), 4), PromptTable(text.tokens, text.null))
