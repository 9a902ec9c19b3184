"""A student's scheduler takes its own times whatever it is asked, and noise that repeats with the sample."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from diffusion_opt.models.student_scheduler import StudentScheduler

LADDER = [1.0, 0.9, 0.75, 0.5]


def sampled(
    scheduler: FlowMatchEulerDiscreteScheduler, x: torch.Tensor, steps: int = 4, **times: object
) -> torch.Tensor:
    """The end of a generation whose velocity is 2 x - t."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(2 * x - t / 1000, t, x, return_dict=False)[0]
    return x


def test_it_takes_its_ladder_and_no_other_times() -> None:
    scheduler = StudentScheduler([LADDER, [1.0]])
    for given in ({}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}, {"sigmas": LADDER}, {"mu": 2.0}):
        scheduler.set_timesteps(**({"num_inference_steps": 4} | given))
        assert scheduler.sigmas.tolist() == pytest.approx([*LADDER, 0.0])
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in LADDER])
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000.0]
    with pytest.raises(ValueError, match="this student was trained for 4, 1 steps, got num_inference_steps=3"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"trained at the times \[1.0, 0.9, 0.75, 0.5\], got sigmas="):
        scheduler.set_timesteps(4, sigmas=[1.0, 0.9, 0.6, 0.3])


def test_without_noise_it_is_euler_s_method() -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=LADDER)
    expected = x
    for t in euler.timesteps:
        expected = euler.step(2 * expected - t / 1000, t, expected, return_dict=False)[0]
    torch.testing.assert_close(sampled(StudentScheduler([LADDER]), x), expected)


def test_noised_again_it_is_diffusers_scheduler_but_for_the_generator() -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = StudentScheduler([[1.0, 0.5]], renoise=True), FlowMatchLCMScheduler()
    ours.set_timesteps(2)
    theirs.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000.0, 500.0])
    first = ours.step(x, ours.timesteps[0], x, return_dict=False)[0]  # predicts zero, so half of the noise is left
    assert torch.equal(first[0] / 0.5, 2 * first[0]) and 0.4 < float(first.std()) < 0.6
    last = ours.step(2 * first, ours.timesteps[1], first, return_dict=False)[0]
    theirs._init_step_index(theirs.timesteps[1])
    torch.testing.assert_close(last, theirs.step(2 * first, theirs.timesteps[1], first, return_dict=False)[0])


def test_noise_repeats_with_the_sample_alone_and_in_any_batch() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    scheduler = StudentScheduler([LADDER], renoise=True)
    whole = sampled(scheduler, x)
    torch.manual_seed(99)
    assert torch.equal(sampled(scheduler, x), whole)
    assert torch.equal(sampled(scheduler, x[1:2]), whole[1:2])
    assert not torch.equal(sampled(scheduler, x + 1e-6), whole)


def test_it_is_saved_and_opened_with_its_ladder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    StudentScheduler([LADDER], renoise=True).save_pretrained(tmp_path)
    opened = StudentScheduler.from_pretrained(tmp_path)
    assert (opened.config.ladders, opened.config.renoise) == ([LADDER], True)
    assert "will be ignored" not in caplog.text


@pytest.mark.parametrize("ladder", [[], [0.9], [1.0, 0.0], [1.0, 0.5, 0.5], [1.0, 0.5, 0.75]])
def test_a_ladder_falls_from_one(ladder: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a ladder falls from 1.0"):
        StudentScheduler([ladder])
