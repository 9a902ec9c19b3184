"""On the shipped teacher: caching must beat the honest baseline, the same solver with fewer steps."""

from itertools import pairwise

import pytest
import torch
from caching.pipelines import generate

from diffusion_opt.caching import TeaCache, calibrate_teacache, step_cache_report
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler

STEPS, BATCH = 30, 5


@pytest.fixture(scope="module")
def teacher(shipped):
    return shipped("fashion")


@pytest.fixture(scope="module")
def dense(teacher):
    return sample(teacher)


@pytest.fixture(scope="module")
def curve(teacher):
    prompts = [str(label) for label in range(10)]
    return calibrate_teacache(teacher, prompts, STEPS, 2.0, torch.Generator().manual_seed(0))


def sample(pipe, steps: int = STEPS):
    return generate(pipe, steps=steps, guidance=2.0, batch=BATCH, seed=11)


def error(images, dense) -> float:
    """Relative L2 distance to the uncached images, mean over samples."""
    return float(((images - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).mean())


def with_cache(pipe, technique, dense) -> tuple[int, float]:
    """Computed steps, and the error."""
    images = sample(technique.apply(pipe))
    computed = step_cache_report(pipe).computed["cond"]
    technique.remove(pipe)
    return computed, error(images, dense)


def test_forecasting_beats_reuse_and_fewer_steps_at_equal_evaluations(teacher, dense):
    computed, forecast = with_cache(teacher, TeaCache(0.12, "forecast"), dense)
    computed_by_reuse, reuse = with_cache(teacher, TeaCache(0.12, "reuse"), dense)
    assert STEPS / 4 < computed < STEPS
    assert abs(computed - computed_by_reuse) <= 1
    assert forecast < reuse
    assert forecast < error(sample(teacher, steps=computed), dense)


def test_on_a_second_order_solver_it_beats_the_same_solver_with_fewer_steps(shipped):
    """The harder rival, and the harder judge: distance to a finely solved path, not to the uncached run."""
    pipe = shipped("fashion")
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)
    fine = sample(pipe, steps=100)
    images = sample(TeaCache(0.2).apply(pipe), steps=12)
    computed = step_cache_report(pipe).computed["cond"]
    TeaCache(0.2).remove(pipe)
    assert computed < 12
    assert error(images, fine) < error(sample(pipe, steps=computed), fine)


def test_the_error_grows_with_the_threshold(teacher, dense):
    runs = [with_cache(teacher, TeaCache(threshold), dense) for threshold in (0.08, 0.2, 0.5)]
    assert all(more > less for (more, _), (less, _) in pairwise(runs))
    assert all(small < large for (_, small), (_, large) in pairwise(runs))


def test_calibration_explains_the_change_and_names_its_rival(teacher, dense, curve, tmp_path):
    assert curve.r2 > 0.5
    assert curve.num_pairs == 10 * (STEPS - 1) * 2
    curve.save(tmp_path / "curve.json")
    computed, off = with_cache(teacher, TeaCache(0.2, curve=str(tmp_path / "curve.json")), dense)
    assert computed < STEPS
    assert off < error(sample(teacher, steps=computed), dense)
