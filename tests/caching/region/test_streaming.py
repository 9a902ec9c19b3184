"""Video-to-video on the stock pipeline: exact where nothing moves, close where something does, at any step count."""

from itertools import pairwise

import pytest
import torch
from diffusers import FluxPipeline
from small_pipelines import small_pipeline
from torch import Tensor

from diffusion_opt.caching.region import StreamingRegionCache, region_report, stream
from diffusion_opt.datasets import load_fashion_mnist
from diffusion_opt.models import TinyFlux2Pipeline


def streamed(pipe: TinyFlux2Pipeline, frames: list[Tensor], cache: StreamingRegionCache | None, **run: object):
    """Images, and the work of each frame."""
    images, work = [], []
    if cache is not None:
        cache.apply(pipe)
    for image in stream(pipe, frames, **run):
        images.append(image)
        if cache is not None:
            work.append(region_report(pipe).work)
    if cache is not None:
        cache.remove(pipe)
    return images, work


def relative(one: Tensor, other: Tensor) -> float:
    """Relative L2 of images in [0, 1], taken in [-1, 1], where the background is not zero."""
    return float((2 * one - 2 * other).norm() / (2 * other - 1).norm())


def moving_patch(num_frames: int = 3) -> list[Tensor]:
    """Four garments on a canvas of 14 x 14 tokens, and a dark patch that moves right by a token a frame."""
    data = load_fashion_mnist("test")
    garments = [data.images[data.labels == label][0] for label in (0, 7, 8, 5)]
    canvas = torch.cat([torch.cat(garments[:2], dim=2), torch.cat(garments[2:], dim=2)], dim=1)[None]
    frames = [canvas.clone() for _ in range(num_frames)]
    for i, frame in enumerate(frames):
        frame[:, :, 8:12, 4 + 4 * i : 8 + 4 * i] = -0.9
    return frames


def test_a_still_source_costs_nothing_and_changes_no_bit():
    pipe = small_pipeline()
    frames = [torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1] * 3
    run = {"prompt": ["0", "1"], "steps": 3, "strength": 0.6, "guidance_scale": 2.0}
    images, work = streamed(pipe, frames, StreamingRegionCache(probe=0.0), **run)
    assert work == [1, 0, 0]
    assert all(torch.equal(image, images[0]) for image in images)
    dense, _ = streamed(pipe, frames, None, **run)
    assert torch.equal(images[0], dense[0])


def test_the_source_is_noised_to_the_strength_with_the_same_noise():
    pipe = small_pipeline()
    frame = torch.zeros(1, 1, 16, 16)
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((kwargs["hidden_states"], float(kwargs["timestep"][0]))), with_kwargs=True
    )
    list(stream(pipe, [frame, frame], ["0"], steps=2, strength=0.5, guidance_scale=1.0))
    assert [time for _, time in seen] == pytest.approx([0.5, 0.25] * 2)
    assert torch.equal(seen[0][0], seen[2][0])
    assert float(seen[0][0].std()) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(("model", "steps"), [("fashion", 2), ("fashion-4step", 2), ("fashion-1step", 1)])
def test_a_moving_patch_on_the_shipped_models(shipped, model, steps):
    pipe, frames = shipped(model), moving_patch()
    run = {"prompt": [""], "steps": steps, "strength": 0.5, "guidance_scale": 1.0}
    dense, _ = streamed(pipe, frames, None, **run)
    images, work = streamed(pipe, frames, StreamingRegionCache(ring=1, probe=0.0), **run)
    assert torch.equal(images[0], dense[0])
    errors = [relative(image, exact) for image, exact in zip(images[1:], dense[1:], strict=True)]
    repeated = [relative(before, exact) for before, exact in pairwise(dense)]
    assert max(errors) <= 0.03
    assert sum(errors) < 0.3 * sum(repeated)
    assert work[0] == 1
    assert max(work[1:]) < 0.15


def test_another_prompt_is_a_full_frame(shipped):
    pipe = StreamingRegionCache(probe=0.0).apply(shipped("fashion-4step"))
    frames = [frame[..., :28, :28] for frame in moving_patch(1)]
    list(stream(pipe, frames, ["pullover"], steps=2))
    list(stream(pipe, frames, ["coat"], steps=2))
    assert [p.reason for p in region_report(pipe).passes] == ["other condition"] * 2


def test_probes_heal_and_a_sensitive_alarm_makes_full_frames(shipped):
    pipe, frames = shipped("fashion-4step"), moving_patch()
    run = {"prompt": ["pullover"], "steps": 2, "strength": 0.5}
    dense, _ = streamed(pipe, frames, None, **run)
    images, work = streamed(pipe, frames, StreamingRegionCache(ring=0, probe=0.2, alarm=1e-3), **run)
    assert all(1 < w < 1.5 for w in work[1:]), "a partial pass, the same in full, then full passes"
    assert all(relative(image, exact) < 1e-6 for image, exact in zip(images, dense, strict=True))


def test_what_cannot_be_streamed_says_why():
    frame = torch.zeros(1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"up to 1, got 2 and 1\.5"):
        list(stream(small_pipeline(), [frame], ["0"], steps=2, strength=1.5))
    other = FluxPipeline(None, None, None, None, None, None, None)
    with pytest.raises(ValueError, match=r"a pipeline of FLUX\.2, got FluxPipeline"):
        list(stream(other, [frame], ["0"], steps=2))
