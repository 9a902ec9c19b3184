"""The independent judge: near its floor for real pictures, far above it for grain that the other judge overlooks."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.evaluation.judges import FashionJudge, ImageNetJudge, Number, RealPictures
from diffusion_opt.evaluation.judges.imagenet import read_reference, reference_of
from diffusion_opt.evaluation.reference import load_reference

JUDGE = ImageNetJudge(resamples=20)


@pytest.fixture(scope="module")
def found(pictures: Tensor, labels: Tensor, fashion: RealPictures) -> dict[str, Number]:
    return JUDGE.measure(pictures, labels, real=fashion)


def test_real_pictures_are_at_the_floor(found: dict[str, Number]) -> None:
    distance = found["imagenet.distance"]
    assert distance.low < distance.value < distance.high
    assert distance.value == pytest.approx(distance.real, rel=0.1)
    assert abs(found["imagenet.kernel_distance"].value) < 0.05 * distance.real
    assert found["imagenet.precision"].value > 0.8
    assert found["imagenet.recall"].value > 0.8


def test_grain_moves_it_much_and_the_fashion_judge_little(
    found: dict[str, Number], pictures: Tensor, grainy: Tensor, labels: Tensor, fashion: RealPictures
) -> None:
    teacher_above_floor = 1.7  # FD (fashion features) of the shipped teacher above its floor, its card
    seen = JUDGE.measure(grainy, labels, real=fashion)
    assert seen["imagenet.distance"].value > 3 * found["imagenet.distance"].value
    assert seen["imagenet.precision"].value < 0.8 * found["imagenet.precision"].value
    overlooked = FashionJudge(resamples=2).measure(grainy, labels)["fashion.distance"]
    assert overlooked.above_real < teacher_above_floor


def test_the_floor_shrinks_with_the_sample_count(fashion: RealPictures) -> None:
    reference = reference_of(fashion)
    floors = [reference.floor(num) for num in (250, 500, 1000, 2000)]
    assert floors == sorted(floors, reverse=True)
    assert reference.floor(2001) is None


def test_clips_are_their_frames(pictures: Tensor, labels: Tensor, fashion: RealPictures) -> None:
    clips = pictures[:20].unflatten(0, (4, 5))
    of_clips = JUDGE.measure(clips, labels[:4], real=fashion)
    of_frames = JUDGE.measure(pictures[:20], labels[:20], real=fashion)
    assert of_clips["imagenet.distance"].value == pytest.approx(of_frames["imagenet.distance"].value)
    assert of_clips["imagenet.distance"].num == 20


def test_real_pictures_may_be_a_tensor_in_color(tmp_path) -> None:
    made = torch.rand(24, 3, 40, 30, generator=torch.Generator().manual_seed(3)) * 2 - 1
    real = RealPictures.of(made, cache=tmp_path / "real.safetensors")
    first = JUDGE.measure(made[:8], ["a"] * 8, real=real)
    kept = read_reference(tmp_path / "real.safetensors")
    assert kept.name == "tensor"
    again = JUDGE.measure(made[:8], ["a"] * 8, real=real)
    assert again["imagenet.distance"].value == pytest.approx(first["imagenet.distance"].value, rel=1e-2)
    other = RealPictures.of(made.flip(0), cache=tmp_path / "real.safetensors")
    with pytest.raises(ValueError, match="features of other pictures"):
        JUDGE.measure(made[:8], ["a"] * 8, real=other)


def test_the_shipped_features_are_those_of_the_shipped_pictures(fashion: RealPictures) -> None:
    small = reference_of(RealPictures("part", fashion.pictures[:8], fashion.held_out[:8]))
    assert torch.allclose(small.examples, reference_of(fashion).examples[:8], atol=2e-2)
    assert load_reference("fashion").split == "test"


def test_without_real_pictures_it_says_what_to_do(pictures: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"pass real=.*'paired'"):
        JUDGE.measure(pictures, labels)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, 2, 8, 8), "1 or 3 channels"),
        (torch.zeros(4, 8, 8), "pictures .* or clips"),
        (torch.zeros(1, 3, 8, 8), "at least 2 pictures"),
        (torch.full((3, 1, 8, 8), torch.nan), "3 of 3 pictures hold NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(given: Tensor, message: str, fashion: RealPictures) -> None:
    with pytest.raises(ValueError, match=message):
        JUDGE.measure(given, [0] * len(given), real=fashion)


def test_prompts_and_pictures_must_pair_up(pictures: Tensor, fashion: RealPictures) -> None:
    with pytest.raises(ValueError, match="got 3 prompts for 500 pictures"):
        JUDGE.measure(pictures, [0, 1, 2], real=fashion)
