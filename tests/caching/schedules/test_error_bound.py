"""The conformal choice: its rule exactly, its guarantee on simulated prompts, and the clear refusals."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from caching.pipelines import generate, run_of, small_pipeline
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching import CalibratedRun, step_cache_report
from diffusion_opt.caching.schedules.error_bound import (
    CALIBRATED,
    ErrorBound,
    ErrorBoundedCache,
    calibrate_error_bound,
    choose,
    least_samples,
    schedule_errors,
)
from diffusion_opt.caching.schedules.recording import generation_tasks

FULL = (True,) * 6
SOME = (True, True, True, False, True, False)
FEW = (True, False, True, False, False, False)


def by_definition(errors: list[list[float]], max_error: float, alpha: float) -> int | None:
    """The rule in plain loops: the largest j with (number of samples with a violation up to j, plus 1) / (n + 1)."""
    best = None
    for j in range(len(errors[0])):
        violations = sum(any(error > max_error for error in row[: j + 1]) for row in errors)
        if (violations + 1) / (len(errors) + 1) <= alpha + 1e-12:
            best = j
    return best


@given(
    st.integers(1, 5).flatmap(
        lambda j: st.lists(st.lists(st.integers(0, 9), min_size=j, max_size=j), min_size=9, max_size=30)
    ),
    st.integers(0, 9),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_the_choice_is_the_rule(drawn, max_error, alpha):
    expected = by_definition(drawn, max_error, alpha)
    if expected is None:
        with pytest.raises(ValueError, match="no schedule keeps the error"):
            choose(torch.tensor(drawn).float(), max_error, 1 - alpha)
    else:
        assert choose(torch.tensor(drawn).float(), max_error, 1 - alpha) == expected


def test_exchangeable_prompts_exceed_the_bound_no_more_often_than_promised():
    """600 calibrations of 19 prompts with non-monotone errors, one new prompt each: violations <= alpha = 0.2."""
    generator = torch.Generator().manual_seed(0)
    violations = []
    for _ in range(600):
        scale = torch.rand(20, 1, generator=generator).exp()
        steps = torch.linspace(0.1, 1.0, 12) * (0.5 + torch.rand(20, 12, generator=generator))
        errors = scale * steps
        violations.append(float(errors[19, choose(errors[:19], 1.0, 0.8)] > 1.0))
    rate = sum(violations) / len(violations)
    assert rate <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 600)
    assert rate > 0.05  # not by being timid


def test_the_choice_grows_with_the_allowed_error_and_falls_with_confidence():
    errors = torch.rand(60, 8, generator=torch.Generator().manual_seed(1)).cumsum(dim=1)
    by_error = [choose(errors, limit, 0.8) for limit in (1.0, 2.0, 3.0, 9.0)]
    by_confidence = [choose(errors, 3.0, confidence) for confidence in (0.5, 0.8, 0.9, 0.95)]
    assert by_error == sorted(by_error) and by_error[-1] == 7 and by_error[0] < 7
    assert by_confidence == sorted(by_confidence, reverse=True) and by_confidence[0] > by_confidence[-1]


@pytest.mark.parametrize(("confidence", "least"), [(0.9, 9), (0.95, 19), (0.5, 1), (0.99, 99), (0.8, 4)])
def test_fewest_samples(confidence, least):
    assert least_samples(confidence) == least
    assert choose(torch.zeros(least, 3), 0.1, confidence) == 2
    if least > 1:
        with pytest.raises(ValueError, match=f"needs {least} calibration samples or more, got {least - 1}"):
            choose(torch.zeros(least - 1, 3), 0.1, confidence)


def test_the_refusal_names_the_least_error_that_would_do():
    errors = torch.arange(1.0, 20).mul(0.01)[:, None]
    with pytest.raises(ValueError, match=r"with confidence 0.9: the gentlest of them needs max_rel_error 0.18 or more"):
        choose(errors, 0.1, 0.9)
    assert choose(errors, 0.18, 0.9) == 0


@pytest.mark.parametrize("confidence", [0.0, 1.0, 90.0])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match=r"inside \(0, 1\), 0.9 for a start"):
        ErrorBoundedCache(0.1, "any", confidence)
    with pytest.raises(ValueError, match="max_rel_error must be above 0"):
        ErrorBoundedCache(0.0, "any")


@pytest.fixture
def bound(pipe) -> ErrorBound:
    """9 samples: the gentler schedule is off by 1 to 9 %, the other by ten times as much."""
    generate(pipe, steps=6, guidance=2.0)
    rows = tuple((0.0, i / 100, i / 10) for i in range(1, 10))
    return ErrorBound(CalibratedRun.of(pipe), "forecast", (FULL, SOME, FEW), rows)


def test_the_cache_runs_the_most_aggressive_schedule_that_qualifies(pipe, bound, tmp_path):
    path = str(tmp_path / "bound.json")
    bound.save(path)
    assert ErrorBound.load(path) == bound
    for allowed, mask in ((0.09, SOME), (0.5, SOME), (0.9, FEW)):
        technique = ErrorBoundedCache(allowed, path, 0.9)
        generate(technique.apply(pipe))
        assert tuple(ran for _, ran in step_cache_report(pipe).passes["cond"]) == mask
        technique.remove(pipe)
    assert technique.describe() == "error at most 0.9 with confidence 0.9"
    assert ErrorBoundedCache(**json.loads(json.dumps(asdict(technique)))) == technique


def test_it_refuses_instead_of_running_uncached(pipe, bound, tmp_path):
    path = str(tmp_path / "bound.json")
    bound.save(path)
    with pytest.raises(ValueError, match=r"only the full run keeps the error at 0.05 .* 4 of 6 steps is off .* 0.09"):
        ErrorBoundedCache(0.05, path, 0.9).apply(pipe)
    with pytest.raises(ValueError, match="needs 19 calibration samples or more, got 9"):
        ErrorBoundedCache(0.5, path, 0.95).apply(pipe)
    with pytest.raises(ValueError, match="was calibrated on model"):
        ErrorBoundedCache(0.5, path, 0.9).apply(small_pipeline(seed=1))
    ErrorBoundedCache(0.5, path, 0.9).apply(pipe)
    with pytest.raises(ValueError, match=r"this run is .* with 7 steps"):
        generate(pipe, steps=7)


def test_errors_are_those_of_real_runs_and_the_measure_is_free():
    pipe = small_pipeline(num_double=1, num_single=1)
    run = run_of("0", "1", "2", batch_size=2)
    bound = calibrate_error_bound(pipe, run, [FEW, SOME], "reuse", num_samples=3)
    tasks = generation_tasks(run, 3, first=CALIBRATED)
    assert bound.masks == (FULL, SOME, FEW)
    errors = torch.tensor(bound.errors)
    assert errors.shape == (3, 3) and not errors[:, 0].any() and (errors[:, 1:] > 0).all()
    torch.testing.assert_close(schedule_errors(pipe, [FULL, SOME], "reuse", tasks), errors[:, :2])
    doubled = schedule_errors(pipe, [SOME], "reuse", tasks, lambda a, b: (a - b).abs().flatten(1).amax(1))
    assert (doubled > 0).all() and not torch.allclose(doubled, errors[:, 1:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": ((0.0, 0.1),)}, "one error for each of 3 masks"),
        ({"masks": (FULL, FEW, SOME)}, r"most first, got \[6, 2, 4\]"),
        ({"masks": (FULL, SOME, (False,) * 6)}, "begin with a computed step"),
        ({"masks": tuple((True,) * n for n in (5, 4, 3))}, "a mask of 5 steps cannot serve 6 steps"),
    ],
)
def test_malformed_bounds_are_refused(bound, change, message):
    with pytest.raises(ValueError, match=message):
        replace(bound, **change)
