"""Several judges in one run: names, a judge of one's own, the claim that needs two of them, and where real ones lie."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio

from diffusion_opt.evaluation import Own, quality
from diffusion_opt.evaluation.judges import JUDGES, Number, RealPictures, at_teacher_quality, judge_named, judged, ratio


class PromptLength(Metric):
    """A metric of pictures and texts, with the arguments of CLIPScore."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("lengths", torch.zeros(2))

    def update(self, images: Tensor, text: list[str]) -> None:
        assert images.dtype == torch.uint8
        self.lengths += torch.tensor([float(sum(map(len, text))), float(len(images))])

    def compute(self) -> Tensor:
        return self.lengths[0] / self.lengths[1]


class Gap(Metric):
    """A metric of real and generated pictures, with the arguments of torchmetrics' FID."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2))

    def update(self, imgs: Tensor, real: bool) -> None:
        self.sums[int(real)] += imgs.mean()

    def compute(self) -> Tensor:
        return self.sums[1] - self.sums[0]


def test_all_judges_side_by_side(pictures: Tensor, labels: Tensor, fashion: RealPictures) -> None:
    some, asked = pictures[:100], labels[:100]
    of_any_picture = set(JUDGES) - {"clips", "portraits"}  # those two know a world of their own
    found = judged(of_any_picture, some, asked, real="fashion", teacher=some.roll(10, 0), resamples=5)
    assert {name.split(".")[0] for name in found} == of_any_picture
    assert all(number.num == 100 for number in found.values())
    stored = json.loads(json.dumps({name: number.to_dict() for name, number in found.items()}))
    assert {name: Number(**number) for name, number in stored.items()} == found
    alone = quality(some, asked, resamples=5)
    assert found["fashion.distance"].value == alone.distance
    assert found["fashion.distance"].real == alone.floor


def test_class_names_are_as_good_as_numbers(pictures: Tensor, labels: Tensor) -> None:
    from diffusion_opt.datasets import FASHION_CLASSES

    names = [FASHION_CLASSES[label] for label in labels[:50]]
    judge = judge_named("fashion", resamples=2)
    assert judge.measure(pictures[:50], names) == judge.measure(pictures[:50], labels[:50])
    with pytest.raises(ValueError, match="not 'a cat'"):
        judge.measure(pictures[:2], ["a cat", "dress"])


def test_a_function_is_a_judge(pictures: Tensor, labels: Tensor) -> None:
    def brightness(images: Tensor, prompts: list) -> Tensor:
        return images.mean((1, 2, 3))

    found = judged([brightness], pictures, labels)["brightness.value"]
    assert found.value == pytest.approx(pictures.mean().item(), abs=1e-6)
    assert found.low < found.value < found.high
    two = Own("both", lambda images, prompts: {"a": 1.0, "b": len(prompts)})
    assert {name: number.value for name, number in judged([two], pictures, labels).items()} == {
        "both.a": 1,
        "both.b": 500,
    }


def test_metrics_are_fed_as_they_ask(pictures: Tensor, labels: Tensor, fashion: RealPictures) -> None:
    some, asked = pictures[:10], ["a bag"] * 10
    assert judged([Own("text", PromptLength(), "bytes")], some, asked)["text.PromptLength"].value == 5
    gap = Own("gap", Gap(), "unit")
    assert gap.needs == {"real"}
    expected = ((fashion.pictures.mean() - some.mean()) / 2).item()
    assert judged([gap], some, asked, real=fashion)["gap.Gap"].value == pytest.approx(expected, abs=1e-4)
    noisy = Own("noise", PeakSignalNoiseRatio(data_range=2.0))
    assert noisy.needs == {"teacher"}
    teacher = (some + 0.1).clamp(-1, 1)
    assert judged([noisy], some, asked, teacher=teacher)["noise.PeakSignalNoiseRatio"].value > 20
    with pytest.raises(ValueError, match="needs real pictures: pass real="):
        judged([gap], some, asked)


@pytest.mark.wrong_shapes
def test_names_that_clash_or_do_not_exist_are_refused(pictures: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="fashion, imagenet, statistics, paired"):
        judge_named("inception")
    with pytest.raises(ValueError, match="two judges are called 'fashion'"):
        judged(["fashion", "fashion"], pictures, labels)
    with pytest.raises(ValueError, match="one number, or one for each of 500"):
        judged([Own("x", lambda images, prompts: torch.zeros(3))], pictures, labels)
    with pytest.raises(ValueError, match="got 'floats'"):
        Own("x", print, "floats")


def numbers(fashion: float, imagenet: float, recall: float = 0.7, detail: float = 1.0) -> dict[str, Number]:
    found = {}
    for judge, value, floor in (("fashion", fashion, 0.2), ("imagenet", imagenet, 100.0)):
        found[f"{judge}.distance"] = Number(value, 1000, judge, real=floor)
        found[f"{judge}.recall"] = Number(recall, 1000, judge)
    return found | {"statistics.total_variation": Number(detail, 1000, "real")}


TEACHER = numbers(2.6, 200.0)


@pytest.mark.parametrize(
    ("student", "failed"),
    [
        (numbers(2.8, 212.0), None),
        (numbers(2.3, 300.0), "imagenet distance"),  # better by the one, twice as far by the other
        (numbers(3.1, 200.0), "fashion distance"),
        (numbers(2.6, 200.0, recall=0.6), "recall"),
        (numbers(2.6, 200.0, detail=1.09), "total_variation"),
    ],
)
def test_teacher_s_quality_needs_all_judges(student: dict[str, Number], failed: str | None) -> None:
    claim = at_teacher_quality(student, TEACHER)
    assert claim.holds == (failed is None)
    assert failed is None or any(line.startswith("not: ") and failed in line for line in claim.reasons)
    assert str(claim).startswith("at the teacher's quality" if claim.holds else "not at the teacher's quality")


def test_one_judge_is_not_enough() -> None:
    for judge in ("fashion", "imagenet"):
        alone = {name: number for name, number in TEACHER.items() if name.startswith(judge)}
        with pytest.raises(ValueError, match="takes two judges"):
            at_teacher_quality(alone, alone)
    other = TEACHER | {"imagenet.distance": dataclasses.replace(TEACHER["imagenet.distance"], num=50)}
    with pytest.raises(ValueError, match="num is 50 here and 1000"):
        at_teacher_quality(other, TEACHER)
    unknown = TEACHER | {"imagenet.distance": dataclasses.replace(TEACHER["imagenet.distance"], real=None)}
    with pytest.raises(ValueError, match="not known"):
        at_teacher_quality(unknown, unknown)
    assert ratio(TEACHER["fashion.recall"], TEACHER["fashion.recall"]) == 1


def test_real_pictures_from_a_folder(tmp_path) -> None:
    for index, size in enumerate([(8, 6), (8, 6), (8, 6), (8, 6), (9, 6)]):
        Image.new("RGB", size, (255, 0, 51 * index)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match=r"pass size= to resize"):
        RealPictures.of(tmp_path)
    real = RealPictures.of(tmp_path, size=(6, 8))
    assert real.pictures.shape == (3, 3, 6, 8)  # every second picture is held out
    assert real.held_out.shape == (2, 3, 6, 8)
    torch.testing.assert_close(real.pictures[1, :, 0, 0], torch.tensor([1.0, -1.0, 102 / 127.5 - 1]))
    assert real.fingerprint != RealPictures.of(tmp_path, size=(8, 6)).fingerprint
    with pytest.raises(ValueError, match="no folder with pictures"):
        RealPictures.of(tmp_path / "nothing")
    with pytest.raises(ValueError, match="at least 2"):
        RealPictures.of(torch.zeros(3, 1, 8, 8))
