"""Scenes and runs of lesson 06: what they note is what the package did."""

import pytest
import torch
from small_pipelines import small_pipeline

from diffusion_opt.caching import FixedSchedule, StreamingRegionCache, region_report
from diffusion_opt.lesson import regions


def frames(*values: float) -> list[torch.Tensor]:
    return [torch.full((1, 1, 16, 16), value) for value in values]


def test_the_sprite_lies_where_it_is_put_and_nowhere_else():
    scene = regions.sneaker_scene()
    frame = scene.frame(8, 40)
    assert frame.shape == (1, 1, 56, 56)
    assert torch.equal(frame[:, :, 8:24, 40:], scene.sprite)
    assert torch.equal(frame[:, :, 24:], scene.canvas[:, :, 24:]) and torch.equal(
        frame[..., :40], scene.canvas[..., :40]
    )
    with pytest.raises(ValueError, match=r"columns 0 … 40, got 8 and 41"):
        scene.frame(8, 41)


def test_tokens_are_patches_in_reading_order():
    tokens = regions.tokens_of(torch.arange(2 * 64.0).reshape(1, 2, 8, 8))
    assert tokens.shape == (1, 4, 32)
    assert tokens[0, 1].min() == 4 and tokens[0, 2].min() == 32
    assert regions.grid(3)[5].tolist() == [0, 1, 2]
    picture = regions.token_picture(torch.tensor([0, 1, 2, 4]), columns=2)
    assert picture.shape == (1, 1, 8, 8)
    assert [picture[0, 0, row, column].item() for row in (3, 4) for column in (3, 4)] == [-1, -0.5, 0, 1]


def test_the_error_is_that_of_pictures_between_minus_one_and_one():
    assert regions.relative(torch.full((2, 3), 0.75), torch.full((2, 3), 1.0)) == pytest.approx(0.5)


def test_a_technique_is_taken_off_even_after_an_error():
    pipe = small_pipeline()
    with pytest.raises(RuntimeError), regions.applied(StreamingRegionCache(), pipe):
        region_report(pipe)
        raise RuntimeError
    with pytest.raises(ValueError, match="no region cache"):
        region_report(pipe)


def test_a_stream_notes_the_work_of_each_frame():
    pipe = small_pipeline()
    dense = regions.streamed(pipe, frames(0.0, 0.0, 0.5), steps=2)
    cached = regions.streamed(pipe, frames(0.0, 0.0, 0.5), StreamingRegionCache(), steps=2)
    assert [(frame.num_computed, frame.work) for frame in dense] == [(None, 1.0)] * 3
    assert [(frame.num_computed, frame.work) for frame in cached] == [(16, 1.0), (0, 0.0), (16, 1.0)]
    assert cached[1].reason == "nothing changed" and all(frame.seconds > 0 for frame in cached)
    assert all(torch.equal(a.image, b.image) for a, b in zip(dense, cached, strict=True))


def test_comparing_gives_error_and_share_of_the_macs():
    pipe = small_pipeline()

    def sample() -> torch.Tensor:
        return pipe(["0"], 2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    (error, macs), (again, _) = regions.compared(pipe, sample, [FixedSchedule((True, False))] * 2)
    assert 0 < error == again and 0.4 < macs < 0.8
    assert torch.equal(sample(), sample())


def test_a_pass_costs_what_its_tokens_cost():
    costs = regions.pass_costs((0.5,), side=8, batch=1, rounds=1)
    assert list(costs) == [1.0, 0.5] and costs[1.0].macs == costs[1.0].time == 1
    assert costs[0.5].macs == pytest.approx(33 / 65, abs=0.02) and costs[0.5].time > 0
