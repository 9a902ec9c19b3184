"""The failures of the gallery fail, each as it says, and the sound settings recover every mode."""

from pathlib import Path

import pytest
import torch

from diffusion_opt.distillation.distribution.failures import FAILURES, PlaneResult, ring, run_in_plane
from diffusion_opt.evaluation.modes import mode_shares

pytestmark = pytest.mark.slow


def run(name: str, out: Path) -> PlaneResult:
    return run_in_plane(FAILURES[name], out)


def test_sound_settings_recover_all_eight_modes(tmp_path: Path) -> None:
    result = run("sound", tmp_path)
    assert result.modes == 8
    assert mode_shares(result.points, ring()).min() > 0.06  # a fair share is 0.125, and some points lie between modes
    assert result.alarm is None


def test_one_update_for_one_still_does_in_the_plane(tmp_path: Path) -> None:
    assert run("one_update", tmp_path).modes == 8


def test_a_slow_fake_score_loses_the_modes_and_the_alarm_says_so(tmp_path: Path) -> None:
    result = run("slow_fake_score", tmp_path)
    assert result.modes <= 4
    assert "does not know the student" in result.alarm


def test_a_frozen_fake_score_drives_the_student_away(tmp_path: Path) -> None:
    result = run("frozen_fake_score", tmp_path)
    assert result.modes == 0 and result.stray > 0.9
    assert result.points.norm(dim=1).mean() > 4  # the ring has radius 3


def test_little_noise_leaves_modes_unseen(tmp_path: Path) -> None:
    assert run("little_noise", tmp_path).modes <= 7


def test_strong_guidance_drops_the_modes_beside_the_other_class(tmp_path: Path) -> None:
    shares = mode_shares(run("strong_guidance", tmp_path).points, ring())
    beside, inner = shares[torch.tensor([0, 3, 4, 7])], shares[torch.tensor([1, 2, 5, 6])]
    assert beside.max() < 0.03 < 0.08 < inner.min()
