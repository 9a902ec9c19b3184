"""The calibrated curve: isotonic, zero at zero, saved and read as it is, refused where it is malformed."""

import dataclasses
import json

import pytest
import torch
from caching.pipelines import small_pipeline
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching.curve import TeaCacheCurve, explained_variance, fingerprint, fit_curve, relative_change

CURVE = TeaCacheCurve(
    changes=(0.0, 0.1, 0.3),
    rescaled=(0.0, 0.4, 0.5),
    model="0123456789abcdef",
    scheduler="FlowMatchEulerDiscreteScheduler",
    num_inference_steps=9,
    guidance_scale=2.5,
    num_pairs=80,
    r2=0.9,
    r2_step_table=0.95,
    step_table=(0.3, 0.2),
)


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
    knots, values = fit_curve(x, y)
    assert (knots[0], values[0]) == (0.0, 0.0)
    order = torch.argsort(x)
    best = isotonic_by_min_max(x[order], y[order])
    for knot, value in list(zip(knots, values, strict=True))[1:]:  # a knot is the mean of its pool
        pooled = (best - value).abs() < 1e-9
        assert pooled.any()
        assert knot == pytest.approx(float(x[order][pooled].mean()))


@given(pairs, st.floats(0, 10), st.floats(0, 10))
def test_curves_never_fall_and_begin_at_zero(drawn, a, b):
    x, y = torch.tensor(drawn, dtype=torch.float64).div(100).unbind(1)
    knots, values = fit_curve(x, y)
    curve = dataclasses.replace(CURVE, changes=knots, rescaled=values)
    low, high = sorted((a, b))
    assert curve(0.0) == 0
    assert 0 <= curve(low) <= curve(high) <= float(y.max()) + 1e-9


def test_equal_inputs_are_pooled():
    assert fit_curve(torch.tensor([0.2, 0.2, 0.4]), torch.tensor([0.1, 0.3, 0.9])) == (
        pytest.approx((0.0, 0.2, 0.4)),
        pytest.approx((0.0, 0.2, 0.9)),
    )


def test_linear_between_knots_and_constant_beyond():
    assert [CURVE(x) for x in (0.05, 0.1, 0.2, 0.3, 7.0)] == pytest.approx([0.2, 0.4, 0.45, 0.5, 0.5])


def test_relative_change_is_per_sample():
    old = torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    new = torch.tensor([[[2.0, -3.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    assert relative_change(new, old).tolist() == [0.25, 0.0, float("inf")]


def test_explained_variance_of_truth_and_of_the_mean():
    y = torch.tensor([1.0, 2.0, 6.0])
    assert explained_variance(y, y) == 1
    assert explained_variance(y, y.mean().expand(3)) == 0


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
        fit_curve(torch.tensor(x), torch.tensor(y))


def test_a_saved_curve_reads_back_equal(tmp_path, monkeypatch):
    CURVE.save(tmp_path / "curve.json")
    assert TeaCacheCurve.load(tmp_path / "curve.json") == CURVE
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    assert TeaCacheCurve.load("curve.json") == CURVE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changes": [0.0, 0.3, 0.1]}, "knots of a curve rise"),
        ({"rescaled": [0.0, 0.5, 0.4]}, "values never fall"),
        ({"rescaled": [0.1, 0.4, 0.5]}, r"first \(0, 0\)"),
        ({"changes": [0.0], "rescaled": [0.0]}, "two knots or more"),
        ({"surplus": 1}, "not a TeaCache curve"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, change, message):
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(dataclasses.asdict(CURVE) | change))
    with pytest.raises(ValueError, match=message):
        TeaCacheCurve.load(path)


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(dataclasses.asdict(CURVE))[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        TeaCacheCurve.load(path)
    with pytest.raises(FileNotFoundError, match="calibrate_teacache"):
        TeaCacheCurve.load(tmp_path / "none.json")


def test_the_fingerprint_knows_the_model_and_forgives_its_blocks():
    pipe = small_pipeline()
    print_ = fingerprint(pipe.transformer)
    assert fingerprint(small_pipeline().transformer) == print_
    assert fingerprint(small_pipeline(seed=1).transformer) != print_
    assert fingerprint(small_pipeline(num_single=2).transformer) != print_
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.add_(1)
        assert fingerprint(pipe.transformer) == print_
        pipe.transformer.x_embedder.weight[0, 0] += 1
    assert fingerprint(pipe.transformer) != print_
