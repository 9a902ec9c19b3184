"""On the shipped models: more tolerance skips more and costs more, and the honest baseline must be beaten.

The baseline is the same solver with as many steps as the cache computed.
"""

import warnings
from itertools import pairwise

import pytest
from caching.pipelines import generate, run_of

from diffusion_opt.caching import (
    EasyCache,
    FirstBlockCache,
    FixedInterval,
    MagCache,
    StepTable,
    TeaCache,
    calibrate_step_cache,
    step_cache_report,
)
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler

STEPS = 16


@pytest.fixture(scope="module")
def teacher(shipped):
    return shipped("fashion-micro")


@pytest.fixture(scope="module")
def dense(teacher):
    return sample(teacher)


@pytest.fixture(scope="module")
def calibration(teacher, tmp_path_factory):
    """The calibration and the path it is saved at."""
    found = calibrate_step_cache(teacher, run_of(*map(str, range(10)), steps=STEPS))
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    found.save(path)
    return found, str(path)


def sample(pipe, steps: int = STEPS):
    return generate(pipe, steps=steps, guidance=2.0, batch=2, seed=11)


def error(images, dense) -> float:
    """Relative L2 distance to the uncached images, mean over samples."""
    return float(((images - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).mean())


def with_cache(pipe, technique, reference, steps: int = STEPS) -> tuple[int, float]:
    """Computed steps, and the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a threshold of nothing, or next to nothing, may skip nothing
        images = sample(technique.apply(pipe), steps)
    computed = step_cache_report(pipe).computed["cond"]
    technique.remove(pipe)
    return computed, error(images, reference)


RULES = {
    "interval": (lambda amount, path: FixedInterval(int(amount), "reuse"), (1, 2, 4)),
    "teacache": (lambda amount, path: TeaCache(amount, "reuse"), (0, 0.15, 0.6)),
    "teacache, calibrated": (lambda amount, path: TeaCache(amount, "reuse", path), (0, 0.2, 0.6)),
    "teacache, polynomial": (lambda amount, path: TeaCache(amount, "reuse", path, "polynomial"), (0, 0.2, 0.6)),
    "first block": (lambda amount, path: FirstBlockCache(amount, "reuse"), (0, 0.2, 0.4)),
    "magnitude": (lambda amount, path: MagCache(amount, path, "reuse", max_skips=9), (0, 0.1, 0.5)),
    "easycache": (lambda amount, path: EasyCache(amount, "reuse"), (0, 0.08, 0.15)),
    "step table": (lambda amount, path: StepTable(amount, path, "reuse"), (0, 0.2, 0.6)),
}


@pytest.mark.parametrize("rule", RULES)
def test_more_tolerance_skips_more_and_costs_more(teacher, dense, calibration, rule):
    make, amounts = RULES[rule]
    runs = [with_cache(teacher, make(amount, calibration[1]), dense) for amount in amounts]
    assert runs[0] == (STEPS, 0.0)
    assert all(more > less for (more, _), (less, _) in pairwise(runs))
    assert all(small < large for (_, small), (_, large) in pairwise(runs))


def test_the_calibration_explains_the_change_and_the_control_explains_more(calibration):
    found = calibration[0]
    assert found.num_pairs == 10 * (STEPS - 1) * 2
    assert 0.5 < found.r2 < found.r2_step_table <= 1
    assert 0.5 < found.r2_polynomial < found.r2_step_table
    assert found.polynomial.faults()  # least squares keeps to nothing that is known about the curve
    assert all(0.5 < ratio < 2 for ratio in found.magnitude_ratios)


def test_forecasting_beats_reuse_and_fewer_steps_at_equal_evaluations(teacher, dense):
    computed, forecast = with_cache(teacher, TeaCache(0.15, "forecast"), dense)
    computed_by_reuse, reuse = with_cache(teacher, TeaCache(0.15, "reuse"), dense)
    assert STEPS / 4 < computed < STEPS
    assert computed <= computed_by_reuse
    assert forecast < reuse
    assert forecast < error(sample(teacher, steps=computed), dense)


def test_the_price_of_a_higher_order(teacher, dense):
    """At one step in three: a line is better than reuse, a parabola overshoots, and Hermite's damping repairs it."""
    errors = {
        name: with_cache(teacher, FixedInterval(3, name), dense)[1]
        for name in ("reuse", "forecast", "quadratic", "hermite")
    }
    assert errors["forecast"] < errors["reuse"] < errors["quadratic"]
    assert errors["hermite"] < errors["reuse"]


def test_on_a_second_order_solver_it_beats_the_same_solver_with_fewer_steps(shipped):
    """The harder rival, and the harder judge: distance to a finely solved path, not to the uncached run."""
    pipe = shipped("fashion-micro")
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)
    fine = sample(pipe, steps=40)
    computed, off = with_cache(pipe, TeaCache(0.15), fine, steps=12)
    assert computed < 12
    assert off < error(sample(pipe, steps=computed), fine)
