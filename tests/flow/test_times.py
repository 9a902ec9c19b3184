"""Times: ends, order, shifts and their inverses, and the logit-normal density."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_opt.flow import logit_normal_times, sampling_times, shift_times

SHIFT = st.floats(0.1, 12)


@settings(deadline=None, max_examples=50)
@given(num_steps=st.integers(1, 60), shift=SHIFT)
def test_sampling_times_fall_from_exactly_one_to_exactly_zero(num_steps, shift):
    times = sampling_times(num_steps, shift)
    assert times.shape == (num_steps + 1,) and times.dtype == torch.float64
    assert times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()


def test_sampling_times_are_even_without_a_shift():
    torch.testing.assert_close(sampling_times(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


def test_shift_formula():
    assert shift_times(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0, 1], dtype=dtype)
        assert torch.equal(shift_times(ends, 0.1), ends)


@settings(deadline=None, max_examples=50)
@given(shift=SHIFT, other=SHIFT, t=st.floats(0, 1))
def test_shifts_invert_and_compose(shift, other, t):
    t = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(shift_times(shift_times(t, shift), 1 / shift), t)
    torch.testing.assert_close(shift_times(shift_times(t, shift), other), shift_times(t, shift * other))


@settings(deadline=None, max_examples=50)
@given(shift=st.floats(1.01, 12))
def test_shift_above_one_moves_towards_noise(shift):
    inside = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    assert (shift_times(inside, shift) > inside).all()
    assert (shift_times(inside, 1 / shift) < inside).all()
    assert torch.equal(shift_times(inside, 1.0), inside)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.6, 1.6, 1.0), (0.4, 0.7, 3.0)])
def test_logit_normal_histogram_matches_the_density(mean, std, shift):
    num, bins = 100_000, 20
    times = logit_normal_times(num, torch.Generator().manual_seed(0), mean, std, shift)
    assert times.shape == (num,) and ((times > 0) & (times < 1)).all()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    before_shift = edges / (shift - (shift - 1) * edges)
    z = (torch.logit(before_shift) - mean) / std
    probability = (0.5 * (1 + torch.erf(z / math.sqrt(2)))).diff()
    counts = torch.histogram(times.double(), edges).hist
    deviation = (counts - num * probability) / (num * probability * (1 - probability)).sqrt().clamp(min=1)
    assert deviation.abs().max() < 4.5
    uniform = (counts - num / bins) / math.sqrt(num / bins)
    assert uniform.abs().max() > 20


def test_logit_normal_times_follow_the_generator():
    draws = [logit_normal_times(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        sampling_times(0)
    with pytest.raises(ValueError, match="std must be positive, got -1"):
        logit_normal_times(3, torch.Generator(), std=-1.0)
    for call in (
        lambda: shift_times(torch.zeros(1), 0.0),
        lambda: sampling_times(4, shift=0.0),
        lambda: logit_normal_times(3, torch.Generator(), shift=0.0),
    ):
        with pytest.raises(ValueError, match="shift must be positive, got 0"):
            call()
