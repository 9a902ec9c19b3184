"""Adams-Bashforth as a diffusers scheduler: second order, in Euler's place, forgetful between generations."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from diffusion_opt.flow import GaussianMixtureVelocity, adams_bashforth2
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler, flow_scheduler

RING = GaussianMixtureVelocity.ring(num_modes=5, std=0.4)


def solve(scheduler, num_steps: int, first: int = 0) -> torch.Tensor:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(RING(x, t.expand(6) / 1000), t, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
def test_equals_the_sampler_on_the_same_grid(num_steps, shift):
    scheduler = FlowMatchAdamsBashforthScheduler(shift=shift)
    found = solve(scheduler, num_steps)
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, adams_bashforth2(RING, noise, scheduler.sigmas), rtol=0, atol=1e-5)


def test_second_order_where_euler_is_first():
    exact = solve(FlowMatchAdamsBashforthScheduler(), 1000)
    for kind, factor in ((FlowMatchEulerDiscreteScheduler, 2), (FlowMatchAdamsBashforthScheduler, 4)):
        coarse, fine = ((solve(kind(), n) - exact).square().mean().sqrt().item() for n in (24, 48))
        assert coarse / fine == pytest.approx(factor, rel=0.2)


def test_one_step_is_euler():
    assert torch.equal(solve(FlowMatchAdamsBashforthScheduler(), 1), solve(FlowMatchEulerDiscreteScheduler(), 1))


@pytest.mark.parametrize("first", [0, 2])
def test_a_new_generation_forgets_the_last_one_wherever_it_starts(first):
    scheduler = FlowMatchAdamsBashforthScheduler()
    fresh = solve(scheduler, 6, first)
    solve(scheduler, 3)
    assert torch.equal(solve(scheduler, 6, first), fresh)


def test_configuration_goes_to_and_fro():
    euler = FlowMatchEulerDiscreteScheduler(shift=2.0, num_train_timesteps=500)
    ours = FlowMatchAdamsBashforthScheduler.from_config(euler.config)
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    for scheduler in (euler, ours, back):
        scheduler.set_timesteps(4)
    assert torch.equal(ours.sigmas, euler.sigmas) and torch.equal(back.timesteps, euler.timesteps)


def test_dtype_of_the_sample_and_tuple_output_are_kept():
    scheduler = FlowMatchAdamsBashforthScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    (moved,) = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert moved.dtype == torch.bfloat16 and (moved == 0.5).all()


def test_sampling_with_noise_is_refused():
    scheduler = FlowMatchAdamsBashforthScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling is True"):
        solve(scheduler, 2)


def test_tokens_at_different_times_are_refused():
    scheduler = FlowMatchAdamsBashforthScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="takes one time for all tokens"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=torch.zeros(1, 3))


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_in_the_place_of_a_multistep_solver_times_and_shift_stay(kind, second_order):
    found = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    new = flow_scheduler(found, second_order)
    for scheduler in (found, new):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(new.sigmas, found.sigmas, rtol=0, atol=2e-6)  # UniPC begins 1e-6 below 1
    assert new.sigmas[1] != pytest.approx(6 / 7, abs=0.05), "the shift is in it"
    again = flow_scheduler(new, second_order)
    again.set_timesteps(7)
    assert torch.equal(again.sigmas, new.sigmas)
    assert new.from_config(new.config).config == new.config


def test_all_flow_solvers_end_where_the_path_does():
    exact = solve(FlowMatchAdamsBashforthScheduler(), 1000)
    found = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for scheduler in (flow_scheduler(found, False), flow_scheduler(found, True)):
        assert (solve(scheduler, 200) - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler integrates a network that predicts epsilon"),
        (UniPCMultistepScheduler(), "predicts epsilon"),
        (FlowMatchLCMScheduler(), "adds noise at each step"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise at each step"),
    ],
)
def test_schedulers_of_other_equations_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        flow_scheduler(found, True)
