"""Plain statistics: exact on pictures whose answer is known, 1 for real pictures, above it with grain."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.evaluation.judges import RealPictures, StatisticsJudge
from diffusion_opt.evaluation.judges.statistics import high_frequency_power, total_variation

JUDGE = StatisticsJudge(resamples=50)


def test_total_variation_of_a_step_and_a_board() -> None:
    step = torch.full((1, 1, 4, 6), -1.0)
    step[..., 3:] = 1  # one of five horizontal differences is 2
    assert total_variation(step).item() == pytest.approx(2 / 5)
    board = (torch.arange(4)[:, None] + torch.arange(6)) % 2 * 2.0 - 1
    assert total_variation(board[None, None]).item() == pytest.approx(4)


def test_power_is_where_the_wave_is() -> None:
    x = torch.arange(32)
    for cycles, share in ((0.125, 0.0), (0.5, 1.0)):  # 0.5: every other pixel
        wave = torch.cos(2 * torch.pi * cycles * x).expand(1, 1, 32, 32)
        power = (wave.double() ** 2).mean().item()
        assert high_frequency_power(wave).item() == pytest.approx(share * power, abs=1e-3)


def test_real_pictures_get_one_and_grain_more_and_blur_less(
    pictures: Tensor, grainy: Tensor, labels: Tensor, fashion: RealPictures
) -> None:
    smooth = F.avg_pool2d(pictures, 3, 1, 1)
    values = {}
    for name, made in {"real": pictures, "grainy": grainy, "smooth": smooth}.items():
        values[name] = JUDGE.measure(made, labels, real=fashion)
    for statistic in ("statistics.high_frequency", "statistics.total_variation"):
        assert values["real"][statistic].value == pytest.approx(1, abs=0.05)
        assert values["real"][statistic].real == pytest.approx(1, abs=0.05)
        assert values["smooth"][statistic].value < 0.9
        assert values["grainy"][statistic].value > values["real"][statistic].value
        assert values["grainy"][statistic].low < values["grainy"][statistic].value < values["grainy"][statistic].high
    # Faint grain is next to nothing in power beside the edges of a garment, and much in total variation.
    assert values["grainy"]["statistics.total_variation"].value > 1.1


def test_without_real_pictures_the_teacher_is_the_measure(pictures: Tensor, labels: Tensor) -> None:
    found = JUDGE.measure(pictures, labels, teacher=pictures)["statistics.total_variation"]
    assert found.value == pytest.approx(1)
    assert found.basis == "against the teacher"
    assert found.real is None


def test_other_sizes_and_nothing_to_compare_with_are_refused(labels: Tensor, fashion: RealPictures) -> None:
    with pytest.raises(ValueError, match=r"\(1, 16, 16\), real ones \(1, 28, 28\)"):
        JUDGE.measure(torch.zeros(4, 1, 16, 16), labels[:4], real=fashion)
    with pytest.raises(ValueError, match="pass real= or teacher="):
        JUDGE.measure(torch.zeros(4, 1, 16, 16), labels[:4])
