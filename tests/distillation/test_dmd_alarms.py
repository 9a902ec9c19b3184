"""Alarms: the numbers mean what they say, and a limit passed gives a message."""

import math
import re

import pytest
import torch
from distillation.planes import toy

from diffusion_opt.distillation.distribution import Alarms, DistributionMatching
from diffusion_opt.distillation.distribution.alarms import compared, observed, smoothed
from diffusion_opt.flow import GaussianMixtureVelocity, clean_from_velocity, interpolate

TEACHER = GaussianMixtureVelocity.ring(num_modes=5, radius=2.0, std=0.3)
STUDENT = GaussianMixtureVelocity.ring(num_modes=5, radius=1.2, std=0.4)
STALE = GaussianMixtureVelocity.ring(num_modes=5, radius=0.2, std=0.2)


def lag(fake: GaussianMixtureVelocity) -> float:
    generator = torch.Generator().manual_seed(0)
    x, t = STUDENT.sample(2000, generator), torch.rand(2000, generator=generator)
    x_t = interpolate(x, torch.randn(2000, 2, generator=generator), t)
    teacher_x, fake_x = (clean_from_velocity(x_t, model(x_t, t), t) for model in (TEACHER, fake))
    return observed(x, teacher_x, fake_x, None, generator)["lag"].item()


def test_lag_is_below_one_for_an_exact_fake_score_and_above_for_a_stale_one() -> None:
    assert lag(STUDENT) < 0.9
    assert lag(TEACHER) == pytest.approx(1.0)
    assert lag(STALE) > 1.1


def test_lag_and_gap_by_hand() -> None:
    x, teacher_x, fake_x = torch.zeros(1, 2), torch.tensor([[2.0, -4.0]]), torch.tensor([[1.0, -1.0]])
    seen = observed(x, teacher_x, fake_x, None, torch.Generator())
    assert seen["lag"].item() == pytest.approx(2 / 20)
    assert seen["gap"].item() == pytest.approx((1 + 3) / 6)


def test_a_reference_tells_contrast_distance_and_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    same, other = TEACHER.sample(500, generator), TEACHER.sample(500, generator)
    fair, harsh = compared(same, other), compared(1.5 * same, other)
    few = compared(same[same[:, 0] > 0], other)
    assert fair["contrast"].item() == pytest.approx(1.0, abs=0.05)
    assert harsh["contrast"].item() == pytest.approx(1.5, abs=0.08)
    assert abs(fair["distance"].item()) < 0.02 < 0.1 < few["distance"].item()
    assert fair["recall"].item() > 0.85 > 0.75 > few["recall"].item()
    assert "recall" not in compared(same[:2], other)


def test_a_reference_is_read_on_the_student_s_turn() -> None:
    method = toy(DistributionMatching, TEACHER, reference=TEACHER.sample(64, torch.Generator().manual_seed(0)))
    losses = method.losses(torch.Generator().manual_seed(0), 16, "student")
    assert losses.keys() == {"loss", "lag", "gap", "contrast", "distance", "recall"}


@pytest.mark.parametrize(
    ("alarms", "values", "message"),
    [
        (Alarms(), {"lag": 1.3}, "lag is 1.3 at step 600, above 1.25: the fake score does not know"),
        (Alarms(max_contrast=1.3), {"contrast": 1.4}, "contrast is 1.4 .* the student over-saturates"),
        (Alarms(max_distance=0.1), {"distance": 0.2}, "distance is 0.2 .* moves away"),
        (Alarms(min_recall=0.4), {"recall": 0.3}, "recall is 0.3 at step 600, below 0.4: the student drops modes"),
    ],
)
def test_a_limit_passed_gives_a_message(alarms: Alarms, values: dict, message: str) -> None:
    assert re.match(message, alarms.check(600, values))
    assert alarms.check(499, values) is None


def test_all_is_well_within_the_limits_and_without_values() -> None:
    alarms = Alarms(1.1, 1.3, 0.4, 0.1)
    assert alarms.check(600, {"lag": 1.0, "contrast": 1.2, "recall": 0.5, "distance": 0.05}) is None
    assert alarms.check(600, {"fake_score_loss": 9.0}) is None
    assert Alarms(max_lag=None).check(600, {"lag": 9.0}) is None


def test_a_value_that_is_not_a_number_does_not_pass_for_well() -> None:
    assert "lag is nan" in Alarms().check(600, {"lag": math.nan})


def test_one_bad_batch_is_no_alarm_but_many_are() -> None:
    assert smoothed({"lag": 1.0}, {"lag": 2.0, "gap": 0.5}) == {"lag": pytest.approx(1.05), "gap": 0.5}
    method = toy(DistributionMatching, TEACHER)
    assert method.alarm(600, {"lag": 1.0}) is None
    assert method.alarm(601, {"lag": 2.0}) is None
    assert method.alarm(602, {"fake_score_loss": 1.0}) is None
    said = [method.alarm(step, {"lag": 2.0}) for step in range(603, 613)]
    assert said[-1] is not None and "fake_updates" in said[-1]
