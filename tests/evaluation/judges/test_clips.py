"""The judge of clips on real clips and on clips with one planted fault each: exactly that figure moves."""

from dataclasses import replace

import pytest
import torch

from diffusion_opt.datasets.clips import ACTIONS, PICTURES, SCENES, clips, parse, prompt, render, sheet
from diffusion_opt.evaluation.judges import ClipsJudge, judge_named, ratio
from diffusion_opt.evaluation.judges.clip_tracking import track
from diffusion_opt.evaluation.judges.clips import chi_square

NUM, CHUNKS = 10, 8
# What counts as moved: more than this from a real clip's figure.
TOLERANCE = {
    "physics": 0.05, "action": 0.05, "identity": 0.02, "turned": 0.2, "clearness": 0.05, "opacity": 0.05,
    "background": 10.0, "drift": 1.0, "flicker": 1.0, "position_error": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return clips(NUM, CHUNKS, seed=11, split="test")


@pytest.fixture(scope="module")
def judge(real):
    return ClipsJudge(truth=real, resamples=20)


@pytest.fixture(scope="module")
def clean(real, judge):
    return judge.measure(real.frames, real.prompts)


def values(numbers):
    return {name.removeprefix("clips."): number.value for name, number in numbers.items()}


def moved_by(judge, clean, frames, prompts):
    found, clean = values(judge.measure(frames, prompts)), values(clean)
    return {name for name, tolerance in TOLERANCE.items() if abs(found[name] - clean[name]) > tolerance}


def test_real_clips_are_found_perfect(clean):
    found = values(clean)
    for name in ("physics", "position_error", "drift", "flicker"):
        assert found[name] == pytest.approx(0, abs=2e-3)
    for name in ("action", "identity", "turned", "clearness", "opacity"):
        assert found[name] == pytest.approx(1, abs=1e-4)
    assert found["background"] > 80
    assert clean["clips.physics"].real == pytest.approx(0, abs=2e-3)


def test_numbers_carry_their_interval_and_their_floor(clean):
    for name in ("physics", "identity", "opacity", "distance", "background"):
        number = clean[f"clips.{name}"]
        assert number.low <= number.value + 1e-9 and number.value <= number.high + 1e-9
        assert number.real is not None and number.num == NUM
    assert ratio(clean["clips.opacity"], clean["clips.opacity"]) == 1


def test_a_shifted_picture_moves_physics_and_position_alone(real, judge, clean):
    """Off its path by 1.2 px in single frames: no action explains that."""
    places = real.motion.positions.clone()
    places[:, 5::4, 1] = (places[:, 5::4, 1] - 1.2).clamp(min=8)
    frames = render(real.scenes, real.motion.pictures, places)
    assert moved_by(judge, clean, frames, real.prompts) - {"turned"} == {"physics", "position_error"}


def test_a_faded_picture_moves_opacity_alone(real, judge, clean):
    scene = sheet().scenes[real.scenes][:, None]
    assert moved_by(judge, clean, scene + 0.6 * (real.frames - scene), real.prompts) == {"opacity"}


def test_mixed_pictures_move_clearness(real, judge, clean):
    other = render(real.scenes, (real.motion.pictures + 3) % len(PICTURES), real.motion.positions)
    moved = moved_by(judge, clean, (real.frames + 0.8 * other) / 1.8, real.prompts)
    assert "clearness" in moved and not moved & {"background", "drift", "flicker", "turned"}


def test_another_picture_moves_identity_alone(real, judge, clean):
    """It turns in the middle of the frame, where nothing was hit."""
    pictures = real.motion.pictures.clone()
    pictures[:, 9:] = (pictures[:, 9:] + 1) % len(PICTURES)
    frames = render(real.scenes, pictures, real.motion.positions)
    assert moved_by(judge, clean, frames, real.prompts) - {"turned"} == {"identity"}


def test_a_picture_that_does_not_turn_moves_turned_alone(real, judge, clean):
    pictures = real.motion.pictures[:, :1].expand_as(real.motion.pictures)
    frames = render(real.scenes, pictures, real.motion.positions)
    assert moved_by(judge, clean, frames, real.prompts) == {"turned"}


def test_another_action_moves_action_alone(real, judge, clean):
    asked = [parse(text) for text in real.prompts]
    opposite = {0: 1, 1: 2, 2: 1, 3: 4, 4: 3}
    wrong = [prompt(PICTURES[p], SCENES[s], [ACTIONS[opposite[a]] for a in row]) for p, s, row in asked]
    found = judge.measure(real.frames, wrong)
    assert found["clips.action"].value < 0.2
    assert moved_by(judge, clean, real.frames, wrong) - {"turned"} == {"action"}


def test_drift_and_flicker_are_told_apart(real, judge, clean):
    ramp = torch.linspace(-0.04, 0.04, 16).view(1, -1, 1, 1, 1)
    beat = 0.03 * (1 - 2 * (torch.arange(16) % 2)).view(1, -1, 1, 1, 1)
    drifting = moved_by(judge, clean, real.frames + ramp, real.prompts)
    flickering = moved_by(judge, clean, real.frames + beat, real.prompts)
    # A pixel that a picture covers for a while misses a part of the ramp or of the beat: its mean is not quite zero.
    assert drifting - {"background"} == {"drift"} and flickering - {"background"} == {"flicker"}


def test_a_wrong_background_moves_background_alone(real, judge, clean):
    assert moved_by(judge, clean, real.frames + 0.02, real.prompts) == {"background"}
    found = judge.measure(real.frames + 0.02, real.prompts)
    assert found["clips.background"].value == pytest.approx(40, abs=0.1)


def test_turns_are_counted_by_chi_square():
    uniform = torch.arange(1, len(PICTURES)).repeat(30)
    assert chi_square(uniform) == (0.0, 1.0)
    uneven = torch.cat([uniform, torch.full((90,), 4)])
    value, probability = chi_square(uneven)
    counts = torch.tensor([30.0] * 8 + [120.0])
    assert value == pytest.approx(((counts - 40) ** 2 / 40).sum().item() / 8)
    assert probability < 0.001
    assert chi_square(torch.tensor([0, 0, 1]))[0] != chi_square(torch.tensor([0, 0, 1]))[0]  # NaN: too few


def test_an_autoencoder_is_a_second_floor(real):
    judge = ClipsJudge(resamples=4, codec=lambda frames: frames + 0.02)
    found = judge.measure(real.frames, real.prompts)
    assert found["clips.codec.background"].value == pytest.approx(40, abs=0.1)
    assert found["clips.background"].value > 80


def test_tracking_survives_noise_and_finds_every_picture():
    places = torch.tensor([[20.3, 30.7], [41.2, 12.9]]).expand(len(PICTURES), 2, 2).contiguous()
    pictures = torch.arange(len(PICTURES))[:, None].expand(-1, 2)
    scenes = torch.arange(len(PICTURES))
    frames = render(scenes, pictures, places)
    found = track(frames + 0.05 * torch.randn(frames.shape), scenes)
    assert torch.equal(found.pictures, pictures)
    assert (found.positions - places).norm(dim=-1).max() < 0.1


@pytest.mark.parametrize(
    ("change", "says"),
    [({"skip": 3}, "skip must be"), ({"skip": 14}, "skip must be"), ({"truth": clips(3, 3, 0)}, "the truth has shape")],
)
def test_wrong_settings_are_refused(real, change, says):
    with pytest.raises(ValueError, match=says):
        replace(ClipsJudge(), **change).measure(real.frames, real.prompts)


@pytest.mark.wrong_shapes
def test_other_clips_and_prompts_are_refused(real):
    judge = judge_named("clips")
    with pytest.raises(ValueError, match="sees clips"):
        judge.measure(real.frames[:, :7], real.prompts)
    with pytest.raises(ValueError, match="one prompt for each clip"):
        judge.measure(real.frames, real.prompts[:3])
    with pytest.raises(ValueError, match="16 frames need 8 actions"):
        judge.measure(real.frames, ["frog, beach: left"] * NUM)
    with pytest.raises(ValueError, match="picture must be one of"):
        judge.measure(real.frames, ["dog, beach: left"] * NUM)
