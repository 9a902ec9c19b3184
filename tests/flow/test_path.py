"""The path and its conversions: the formula, the ends, inverses, and clear errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_opt.flow import (
    clean_from_velocity,
    expand_time,
    interpolate,
    noise_from_velocity,
    randn,
    velocity_from_clean,
    velocity_from_noise,
    velocity_target,
)

DIMENSION = st.integers(1, 4)
SHAPES = st.one_of(st.just((2, 3, 5, 7)), st.tuples(DIMENSION), st.lists(DIMENSION, min_size=2, max_size=4).map(tuple))


@st.composite
def cases(draw):
    """Data, noise (float64) and one time in [0.02, 0.98] per item."""
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    times = draw(st.lists(st.floats(0.02, 0.98), min_size=shape[0], max_size=shape[0]))
    return x, noise, torch.tensor(times, dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_true_velocity_gives_back_data_and_noise(case):
    x, noise, t = case
    x_t, v = interpolate(x, noise, t), velocity_target(x, noise)
    torch.testing.assert_close(clean_from_velocity(x_t, v, t), x)
    torch.testing.assert_close(noise_from_velocity(x_t, v, t), noise)
    torch.testing.assert_close(velocity_from_clean(x_t, x, t), v)
    torch.testing.assert_close(velocity_from_noise(x_t, noise, t), v)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_conversions_are_inverse_for_any_prediction(case):
    x_t, v, t = case
    torch.testing.assert_close(velocity_from_clean(x_t, clean_from_velocity(x_t, v, t), t), v)
    torch.testing.assert_close(velocity_from_noise(x_t, noise_from_velocity(x_t, v, t), t), v)
    torch.testing.assert_close(interpolate(clean_from_velocity(x_t, v, t), noise_from_velocity(x_t, v, t), t), x_t)


def test_interpolate_is_the_formula_for_each_item():
    g = torch.Generator().manual_seed(0)
    x, noise = randn((2, 3, 5, 7), g), randn((2, 3, 5, 7), g)
    x_t = interpolate(x, noise, torch.tensor([0.25, 1.0]))
    assert torch.equal(x_t[0], 0.75 * x[0] + 0.25 * noise[0])
    assert torch.equal(x_t[1], noise[1])
    assert torch.equal(interpolate(x, noise, torch.zeros(2)), x)


def test_velocity_is_the_time_derivative_of_the_path():
    x, noise = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    _, derivative = torch.func.jvp(lambda t: interpolate(x, noise, t), (torch.tensor([0.3]),), (torch.ones(1),))
    torch.testing.assert_close(derivative, velocity_target(x, noise))


def test_expand_time_broadcasts():
    x = torch.zeros(2, 3, 5, 7)
    assert expand_time(torch.tensor([0.1, 0.9]), x).shape == (2, 1, 1, 1)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("t", [torch.zeros(3), torch.zeros(2, 1), torch.tensor(0.5)])
def test_expand_time_refuses_other_shapes(t):
    with pytest.raises(ValueError, match=r"shape \(2,\), got shape"):
        expand_time(t, torch.zeros(2, 3))


def test_conversions_refuse_the_end_that_says_nothing():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="t > 0, got a smallest t of 0"):
        velocity_from_clean(x, x, torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="t < 1, got a largest t of 1"):
        velocity_from_noise(x, x, torch.tensor([0.5, 1.0]))


def test_randn_follows_its_generator():
    draws = [randn((2, 3), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
