"""Extrapolation in time: exact on polynomials of its order, whatever the spacing of the anchors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching.predictors import PREDICTORS, Anchor, Extrapolation


def polynomial(coefficients: torch.Tensor, time: float) -> torch.Tensor:
    return sum(c * time**k for k, c in enumerate(coefficients))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_exact_on_polynomials_of_its_order(order):
    coefficients = torch.randn(order + 1, 2, 5, 3, dtype=torch.float64)
    times = [1.0, 0.93, 0.71, 0.68, 0.4][-(order + 1) :]
    anchors = [Anchor(time, polynomial(coefficients, time)) for time in times]
    predicted = Extrapolation(order).predict(anchors, 0.13)
    torch.testing.assert_close(predicted, polynomial(coefficients, 0.13), rtol=1e-10, atol=1e-10)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=2, unique=True), st.integers(0, 1000))
def test_a_forecast_is_the_line_through_the_last_two(ticks, at):
    early, late = sorted((tick / 1000 for tick in ticks), reverse=True)
    values = torch.randn(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    anchors = [Anchor(9.0, torch.full((1, 2, 3), torch.nan, dtype=torch.float64))]  # an older one is not looked at
    anchors += [Anchor(early, values[0]), Anchor(late, values[1])]
    line = np.polyfit([early, late], values.flatten(1).numpy(), 1)
    expected = torch.from_numpy(line[0] * at / 1000 + line[1]).view(1, 2, 3)
    torch.testing.assert_close(PREDICTORS["forecast"].predict(anchors, at / 1000), expected, rtol=1e-6, atol=1e-6)


def test_reuse_returns_the_last_residual_bit_for_bit():
    anchors = [Anchor(0.9, torch.randn(2, 5, 3)), Anchor(0.8, torch.randn(2, 5, 3))]
    assert torch.equal(PREDICTORS["reuse"].predict(anchors, 0.1), anchors[-1].residual)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=4, unique_by=lambda t: round(t, 2)), st.floats(0, 1))
def test_weights_add_up_to_one(times, at):
    assert sum(Extrapolation(len(times) - 1).weights(times, at)) == pytest.approx(1, abs=1e-6)


def test_too_few_anchors_and_a_negative_order_are_refused():
    with pytest.raises(ValueError, match="needs 2 computed steps, got 1"):
        PREDICTORS["forecast"].predict([Anchor(1.0, torch.zeros(1, 2, 3))], 0.5)
    with pytest.raises(ValueError, match="got -1"):
        Extrapolation(-1)
