"""Paired with the teacher: 0 for its own pictures, 1 for unrelated ones, and growing with what is changed."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.evaluation.judges import PairedJudge

JUDGE = PairedJudge(resamples=50)
NUMBERS = ("paired.pixel", "paired.feature", "paired.perceptual")


@pytest.fixture(scope="module")
def some(pictures: Tensor) -> Tensor:
    return pictures[:60]


def test_the_same_pictures_are_at_zero(some: Tensor, labels: Tensor) -> None:
    found = JUDGE.measure(some, labels[:60], teacher=some)
    assert tuple(found) == NUMBERS
    assert all(number.value == 0 for number in found.values())


def test_unrelated_pictures_are_at_one(some: Tensor, labels: Tensor) -> None:
    found = JUDGE.measure(some.roll(1, 0), labels[:60], teacher=some)
    assert all(number.value == pytest.approx(1) for number in found.values())


def test_distances_grow_with_the_change(some: Tensor, labels: Tensor) -> None:
    noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
    rows = [JUDGE.measure(some + scale * noise, labels[:60], teacher=some) for scale in (0.01, 0.05, 0.2)]
    for name in NUMBERS:
        values = [row[name].value for row in rows]
        assert values == sorted(values)
        assert values[0] > 0
        assert rows[1][name].low < values[1] < rows[1][name].high


def test_clips_pair_frame_by_frame(some: Tensor, labels: Tensor) -> None:
    clips = some.unflatten(0, (12, 5))
    changed = clips.clone()
    changed[:, 2] = changed[:, 2].flip(-1)
    found = JUDGE.measure(changed, labels[:12], teacher=clips)
    assert found["paired.pixel"].num == 60
    assert 0 < found["paired.pixel"].value < 1


def test_color_of_another_size() -> None:
    made = torch.rand(6, 3, 40, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = JUDGE.measure(made, ["a cat"] * 6, teacher=made.roll(1, 0))
    assert all(number.value == pytest.approx(1) for number in found.values())


@pytest.mark.wrong_shapes
def test_what_does_not_pair_up_is_refused(some: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="pass teacher="):
        JUDGE.measure(some, labels[:60])
    with pytest.raises(ValueError, match="pair by pair"):
        JUDGE.measure(some, labels[:60], teacher=some[:30])
    with pytest.raises(ValueError, match="all the same"):
        JUDGE.measure(some, labels[:60], teacher=some[:1].expand(60, -1, -1, -1))
