"""Codec, model and stream of clips with random weights: what holds whatever the weights are."""

import itertools

import pytest
import torch

import diffusion_opt
from diffusion_opt.datasets.clips import clips
from diffusion_opt.models.causal import ClipModel, TubeAutoencoder


@pytest.fixture(scope="module")
def real():
    return clips(8, 4, seed=3)


@pytest.fixture(scope="module")
def model():
    made = ClipModel.build(dim=24, layers=2, heads=2, channels=12, window=3, sink=1, patch=2, codec_clips=8).eval()
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made.requires_grad_(False)


def take(frames, number):
    return torch.stack(list(itertools.islice(frames, number)))


def test_all_components_are_lossless_and_fewer_lose_what_they_say(real):
    whole = TubeAutoencoder(384).fit(real.frames)
    torch.testing.assert_close(whole.decode(whole.encode(real.frames)), real.frames, atol=1e-3, rtol=0)
    part = TubeAutoencoder(24).fit(real.frames)
    z = part.encode(real.frames)
    assert z.shape == (8, 4, 24, 1, 8, 8)
    assert z.var().item() == pytest.approx(1, rel=0.05)
    lost = (part.decode(z) - real.frames).square().mean()
    total = part.tubes(real.frames).flatten(0, 3).var(0).mean()
    assert lost / total == pytest.approx(1 - part.kept.item(), rel=0.02)


@pytest.mark.wrong_shapes
def test_other_sizes_are_refused_by_the_codec(real):
    with pytest.raises(ValueError, match="multiples of 2 frames"):
        TubeAutoencoder(4).encode(real.frames[:, :3])
    with pytest.raises(ValueError, match="multiples of 2 frames"):
        TubeAutoencoder(4).encode(real.frames[..., :60])


@pytest.mark.parametrize("steps", [1, 3])
def test_the_fused_stream_is_the_plain_one(model, real, steps):
    """Also over the edge of the window, and after real frames."""
    made = []
    for fused in (True, False):
        with diffusion_opt.stream(model, "ghost", "night", steps=steps, seed=2, fused=fused) as frames:
            frames.start_from(real.frames[0, :4])
            made.append(take(frames, 12))
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=0)
    assert made[0].shape == (12, 3, 64, 64) and made[0].std() > 0


def test_the_newest_action_steers_from_the_next_chunk_on(model):
    made = {}
    for name, presses in (("none", {}), ("left", {4: ["right", "left"]}), ("only left", {4: ["left"]})):
        with diffusion_opt.stream(model, "frog", "farm", seed=5) as frames:
            taken = []
            for number in range(8):
                for action in presses.get(number, []):
                    frames.press(action)
                taken.append(next(frames))
            made[name] = torch.stack(taken)
    assert torch.equal(made["left"], made["only left"])
    assert torch.equal(made["left"][:4], made["none"][:4]) and not torch.equal(made["left"][4:], made["none"][4:])


def test_a_stream_tells_its_speed_and_latency(model):
    with diffusion_opt.stream(model, seed=0) as frames:
        assert frames.latency_s is None and frames.first_frame_s is None
        take(frames, 3)
        assert frames.first_frame_s > 0 and frames.frames_per_second > 0 and frames.latency_s is None
        frames.press("up")
        next(frames)  # belongs to a chunk that was made before
        assert frames.latency_s is None
        next(frames)
        assert 0 < frames.latency_s < 60
        assert len(frames.cache.numbers) <= 3 + 1


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bit_memory_hardly_changes_the_frames(model, precision):
    made = []
    for kind in ("native", precision):
        with diffusion_opt.stream(model, seed=4, precision=kind) as frames:
            made.append(take(frames, 8))
    error = (made[0] - made[1]).square().mean()
    assert 0 < error < 0.01 * made[0].var()


@pytest.mark.wrong_shapes
def test_bad_input_is_refused_and_nothing_is_left_half_done(model, real):
    with pytest.raises(ValueError, match="picture must be one of"):
        diffusion_opt.stream(model, "dog")
    with pytest.raises(ValueError, match="steps must be an integer"):
        diffusion_opt.stream(model, steps=0)
    with pytest.raises(ValueError, match="needs a ClipModel, got 'folder'"):
        diffusion_opt.stream("folder")
    assert model.stream_under_way is None
    with diffusion_opt.stream(model) as frames:
        with pytest.raises(ValueError, match="is under way"):
            diffusion_opt.stream(model)
        with pytest.raises(ValueError, match="action must be one of"):
            frames.press("jump")
        next(frames)
        with pytest.raises(ValueError, match="has begun"):
            frames.start_from(real.frames[0, :2])
    for late in (lambda: next(frames), lambda: frames.press("up")):
        with pytest.raises(ValueError, match="was stopped"):
            late()
    with diffusion_opt.stream(model) as other, pytest.raises(ValueError, match="frames must be"):
        other.start_from(torch.zeros(4, 3, 32, 32))
    with diffusion_opt.stream(model) as again:
        next(again)


def test_a_window_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="must fit the 64 positions"):
        ClipModel(model.transformer, model.words, model.codec, window=64, sink=1)


def test_a_model_is_saved_and_opened(model, tmp_path):
    model.save(tmp_path)
    again = ClipModel.open(tmp_path).eval()
    assert (again.window, again.sink) == (3, 1) and ClipModel.open(tmp_path, window=2).window == 2
    made = []
    for each in (model, again):
        with diffusion_opt.stream(each, seed=1) as frames:
            made.append(take(frames, 4))
    torch.testing.assert_close(made[0], made[1])
    with pytest.raises(FileNotFoundError, match="no part of a model of clips"):
        ClipModel.open(tmp_path / "nothing")
