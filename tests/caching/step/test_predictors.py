"""Predictors: exact on the polynomials of their order, whatever the spacing of the anchors, on every stream."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching.step.predictors import PREDICTORS, Anchor, Extrapolation, Hermite

TIMES = [1.0, 0.93, 0.71, 0.68, 0.4]


def polynomial(coefficients: torch.Tensor, time: float) -> torch.Tensor:
    return sum(c * time**k for k, c in enumerate(coefficients))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_exact_on_polynomials_of_its_order(order):
    video, audio = torch.randn(order + 1, 2, 5, 3, dtype=torch.float64), torch.randn(order + 1, 2, 7, 4).double()
    anchors = [
        Anchor(time, {"video": polynomial(video, time), "audio": polynomial(audio, time)})
        for time in TIMES[-(order + 1) :]
    ]
    predicted = Extrapolation(order).predict(anchors, 0.13)
    torch.testing.assert_close(predicted["video"], polynomial(video, 0.13), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(predicted["audio"], polynomial(audio, 0.13), rtol=1e-10, atol=1e-10)
    assert list(predicted) == ["video", "audio"]


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=2, unique=True), st.integers(0, 1000))
def test_a_forecast_is_the_line_through_the_last_two(ticks, at):
    early, late = sorted((tick / 1000 for tick in ticks), reverse=True)
    values = torch.randn(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    anchors = [Anchor(9.0, {"hidden": torch.full((1, 2, 3), torch.nan)})]  # an older one is not looked at
    anchors += [Anchor(early, {"hidden": values[0]}), Anchor(late, {"hidden": values[1]})]
    line = np.polyfit([early, late], values.flatten(1).numpy(), 1)
    expected = torch.from_numpy(line[0] * at / 1000 + line[1]).view(1, 2, 3)
    found = PREDICTORS["forecast"].predict(anchors, at / 1000)["hidden"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_reuse_returns_the_last_residual_bit_for_bit():
    anchors = [Anchor(0.9, {"hidden": torch.randn(2, 5, 3)}), Anchor(0.8, {"hidden": torch.randn(2, 5, 3)})]
    assert torch.equal(PREDICTORS["reuse"].predict(anchors, 0.1)["hidden"], anchors[-1].residual["hidden"])


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=4, unique_by=lambda t: round(t, 2)), st.floats(0, 1))
def test_weights_add_up_to_one(times, at):
    assert sum(Extrapolation(len(times) - 1).weights(times, at)) == pytest.approx(1, abs=1e-6)
    assert sum(Hermite(len(times) - 1).weights(times, at)) == pytest.approx(1, abs=1e-6)


@given(
    st.lists(st.integers(0, 100), min_size=3, max_size=3, unique=True), st.integers(0, 100), st.sampled_from([0.3, 1.0])
)
def test_hermite_is_the_formula_written_out(ticks, at, scale):
    """Order 2: r_1 + 2 s^2 x (r_1 - r_0) + s^2 (4 s^2 x^2 - 2) h^2 r[t_1, t_0, t_-1]."""
    (t_, t0, t1), t = (tick / 100 for tick in ticks), at / 100
    r_, r0, r1 = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
    gap = t1 - t0
    x = (t - t1) / gap
    second = ((r1 - r0) / gap - (r0 - r_) / (t0 - t_)) / (t1 - t_)
    expected = r1 + 2 * scale**2 * x * (r1 - r0) + scale**2 * (4 * (scale * x) ** 2 - 2) * gap**2 * second
    weights = Hermite(2, scale).weights([t_, t0, t1], t)
    assert np.dot(weights, [r_, r0, r1]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_hermite_of_order_one_is_a_damped_line():
    line, damped = Extrapolation(1), Hermite(1)
    assert Hermite(1, 0.5**0.5).weights([0.9, 0.7], 0.6) == pytest.approx(line.weights([0.9, 0.7], 0.6))
    assert damped.weights([0.9, 0.7], 0.6)[0] == pytest.approx(line.weights([0.9, 0.7], 0.6)[0] / 2)


def test_hermite_agrees_with_numpy_at_third_order():
    times, at, scale = [0.9, 0.8, 0.7, 0.6], 0.57, 0.5  # even grid: backward differences by np.diff
    values = np.array([0.3, -1.2, 0.7, 2.0])
    x = (at - times[-1]) / (times[-1] - times[-2])
    expected = values[-1]
    for k in range(1, 4):
        hermite = np.polynomial.hermite.hermval(scale * x, [0] * k + [1])
        expected += np.diff(values, k)[-1] / [1, 1, 2, 6][k] * scale**k * hermite
    assert np.dot(Hermite(3, scale).weights(times, at), values) == pytest.approx(expected)


def test_the_cost_is_stated():
    assert {name: predictor.num_anchors for name, predictor in PREDICTORS.items()} == {
        "reuse": 1,
        "forecast": 2,
        "quadratic": 3,
        "hermite": 3,
    }


def test_too_few_anchors_and_bad_settings_are_refused():
    with pytest.raises(ValueError, match="needs 2 computed steps, got 1"):
        PREDICTORS["forecast"].predict([Anchor(1.0, {"hidden": torch.zeros(1, 2, 3)})], 0.5)
    with pytest.raises(ValueError, match="got -1"):
        Extrapolation(-1)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        Hermite(0)
    for scale in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"in \(0, 1\], got {scale}"):
            Hermite(1, scale)
