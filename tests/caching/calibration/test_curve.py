"""The calibrated curve: isotonic, zero at zero, linear between its knots."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching.calibration.curve import (
    IsotonicCurve,
    explained_variance,
    fit_isotonic,
    identity,
    relative_change,
)

CURVE = IsotonicCurve((0.0, 0.1, 0.3), (0.0, 0.4, 0.5))


def isotonic_by_min_max(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The textbook's closed form for sorted x: max over a <= i of min over b >= i of mean(y[a..b])."""
    n = len(y)
    mean = torch.full((n, n), torch.nan, dtype=y.dtype)
    for a in range(n):
        for b in range(a, n):
            mean[a, b] = y[a : b + 1].mean()
    return torch.stack([max(min(mean[a, b] for b in range(i, n)) for a in range(i + 1)) for i in range(n)])


pairs = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), min_size=1, max_size=12, unique_by=lambda p: p[0])


@given(pairs)
def test_the_fit_is_the_isotonic_regression(drawn):
    x, y = torch.tensor(drawn, dtype=torch.float64).div(100).unbind(1)
    curve = fit_isotonic(x, y)
    assert (curve.changes[0], curve.rescaled[0]) == (0.0, 0.0)
    order = torch.argsort(x)
    best = isotonic_by_min_max(x[order], y[order])
    values = torch.tensor(curve.rescaled[1:], dtype=torch.float64)
    for knot, value in list(zip(curve.changes, curve.rescaled, strict=True))[1:]:  # a knot is the mean of its pool
        pooled = x[order][(best - value).abs() < 1e-9]
        assert len(pooled)
        assert pooled.min() - 1e-9 <= knot <= pooled.max() + 1e-9
        if ((values - value).abs() < 1e-9).sum() == 1:  # two pools of one value may stay apart
            assert knot == pytest.approx(float(pooled.mean()))


@given(pairs, st.floats(0, 10), st.floats(0, 10))
def test_curves_never_fall_and_begin_at_zero(drawn, a, b):
    x, y = torch.tensor(drawn, dtype=torch.float64).div(100).unbind(1)
    curve = fit_isotonic(x, y)
    low, high = sorted((a, b))
    assert curve(0.0) == 0
    assert 0 <= curve(low) <= curve(high) <= float(y.max()) + 1e-9


def test_equal_inputs_are_pooled():
    curve = fit_isotonic(torch.tensor([0.2, 0.2, 0.4]), torch.tensor([0.1, 0.3, 0.9]))
    assert curve.changes == pytest.approx((0.0, 0.2, 0.4))
    assert curve.rescaled == pytest.approx((0.0, 0.2, 0.9))


def test_linear_between_knots_and_constant_beyond():
    assert [CURVE(x) for x in (0.05, 0.1, 0.2, 0.3, 7.0)] == pytest.approx([0.2, 0.4, 0.45, 0.5, 0.5])
    assert identity(0.37) == 0.37


def test_relative_change_is_per_sample():
    old = torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    new = torch.tensor([[[2.0, -3.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    assert relative_change(new, old).tolist() == [0.25, 0.0, float("inf")]


def test_explained_variance_of_truth_and_of_the_mean():
    y = torch.tensor([1.0, 2.0, 6.0])
    assert explained_variance(y, y) == 1
    assert explained_variance(y, y.mean().expand(3)) == 0
    assert explained_variance(y[:1], y[:1]) == 1


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.1], [float("inf")], "residual was all zero"),
        ([-0.1], [0.2], "0 or more"),
        ([0.0, 0.0], [0.2, 0.1], "never changed"),
        ([], [], "never changed"),
    ],
)
def test_pairs_that_cannot_be_fitted(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit_isotonic(torch.tensor(x), torch.tensor(y))


@pytest.mark.parametrize(
    ("changes", "rescaled", "message"),
    [
        ((0.0, 0.3, 0.1), (0.0, 0.4, 0.5), "knots of a curve rise"),
        ((0.0, 0.1, 0.3), (0.0, 0.5, 0.4), "values never fall"),
        ((0.0, 0.1, 0.3), (0.1, 0.4, 0.5), r"first \(0, 0\)"),
        ((0.0,), (0.0,), "two knots or more"),
    ],
)
def test_a_curve_that_is_none_is_refused(changes, rescaled, message):
    with pytest.raises(ValueError, match=message):
        IsotonicCurve(changes, rescaled)
