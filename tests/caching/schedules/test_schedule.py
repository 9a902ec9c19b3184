"""A searched schedule is saved with what it was searched for, followed to the letter there, and refused elsewhere."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from caching.pipelines import generate, run_of, small_pipeline

from diffusion_opt.caching import CalibratedRun, FixedSchedule, step_cache_report
from diffusion_opt.caching.rules.fixed import marks
from diffusion_opt.caching.schedules.recording import generation_tasks, relative_error
from diffusion_opt.caching.schedules.schedule import CacheSchedule, ScheduledCache, search_schedule
from diffusion_opt.caching.schedules.search import SearchSettings, measure_costs, starting_masks
from diffusion_opt.caching.step.interop import cache_dit_mask
from diffusion_opt.caching.step.stack import attached_cut
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler

MASK = (True, True, False, True, False, False)
SETTINGS = SearchSettings(amplify_every=4, max_gap=4, trials=2)


def schedule_for(pipe, mask=MASK, predictor="forecast") -> CacheSchedule:
    generate(pipe, steps=len(mask), guidance=2.0)
    return CacheSchedule(CalibratedRun.of(pipe), predictor, mask, 0.12, 0.1, 0.11, 20)


@pytest.fixture
def saved(pipe, tmp_path) -> str:
    path = tmp_path / "found.json"
    schedule_for(pipe).save(path)
    return str(path)


def test_it_reads_back_equal_by_path_and_by_shipped_name(pipe, saved, tmp_path, monkeypatch):
    schedule = schedule_for(pipe)
    assert CacheSchedule.load(saved) == schedule
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    (tmp_path / "caching").mkdir()
    schedule.save(tmp_path / "caching" / "toy-3.json")
    assert CacheSchedule.load("toy-3") == CacheSchedule.load("caching/toy-3.json") == schedule
    with pytest.raises(FileNotFoundError, match=r"no schedule named toy-4 .*there are: toy-3.*cache search"):
        CacheSchedule.load("toy-4")


def test_the_pipeline_follows_the_mask_and_is_restored(pipe, saved):
    dense = generate(pipe)
    technique = ScheduledCache(saved)
    assert technique.predictor == "forecast"
    cached = generate(technique.apply(pipe))
    passes = step_cache_report(pipe).passes
    assert [marks([ran for _, ran in passes[name]]) for name in ("cond", "uncond")] == [marks(MASK)] * 2
    technique.remove(pipe)
    assert torch.equal(generate(pipe), dense)
    same = FixedSchedule(MASK, "forecast")
    assert torch.equal(generate(same.apply(pipe)), cached)
    assert ScheduledCache(**json.loads(json.dumps(asdict(technique)))) == technique
    assert technique.describe() == "searched schedule found"


def test_another_model_or_run_is_refused(pipe, saved):
    technique = ScheduledCache(saved)
    other = small_pipeline(seed=1)
    with pytest.raises(ValueError, match="was calibrated on model"):
        technique.apply(other)
    assert attached_cut(other.transformer) is None
    technique.apply(pipe)
    with pytest.raises(ValueError, match=r"with 6 steps, this run is .* with 7 steps"):
        generate(pipe, steps=7)
    with pytest.raises(ValueError, match="this run has guidance 3"):
        generate(pipe, guidance=3.0)
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="this run is FlowMatchAdamsBashforthScheduler"):
        generate(pipe)


def test_search_reports_the_errors_it_measured():
    pipe = small_pipeline(num_double=1, num_single=1)
    (task,), held_out = (generation_tasks(run_of("0", "1"), first=first) for first in (0, 50))
    dense = task.run(pipe)
    costs = measure_costs(pipe, [task], SETTINGS)
    found = search_schedule(pipe, task, starting_masks(costs, 3), SETTINGS, held_out)
    assert found.num_computed == 3 and found.num_held_out == 2
    assert found.error <= found.start_error
    technique = found.fixed()
    technique.apply(pipe)
    for one, error in ((task, found.error), (held_out[0], found.held_out_error)):
        cached = one.run(pipe)
        technique.remove(pipe)
        full = one.run(pipe)
        technique.apply(pipe)
        real = ((cached - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean()
        assert float(real) == pytest.approx(error)
    technique.remove(pipe)
    assert torch.equal(task.run(pipe), dense)
    assert f"{marks(found.mask)} 3 of 6 steps" in found.describe() and "held-out" in found.describe()
    again = search_schedule(pipe, task, [found.mask], SETTINGS)
    assert again.start_error == pytest.approx(found.error) and again.error <= found.error
    assert again.held_out_error is None
    with pytest.raises(ValueError, match=r"same number of steps, got \[3, 6\]"):
        search_schedule(pipe, task, [found.mask, (True,) * 6], SETTINGS)


def test_it_goes_to_cache_dit_as_ones_and_zeros(pipe):
    assert cache_dit_mask(schedule_for(pipe).fixed())["steps_computation_mask"] == [1, 1, 0, 1, 0, 0]


def test_malformed_files_are_refused(pipe, tmp_path):
    schedule = schedule_for(pipe)
    path = tmp_path / "bad.json"
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "is not a schedule"),
        (json.dumps(asdict(schedule) | {"threshold": 1}), "CacheSchedule has exactly"),
        (json.dumps(asdict(schedule) | {"run": {}}), "CalibratedRun has exactly"),
        (json.dumps(asdict(schedule) | {"mask": [False, True]}), "must begin with a computed step"),
        (json.dumps(asdict(schedule) | {"mask": [True, False]}), "a mask of 2 steps cannot serve 6 steps"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            CacheSchedule.load(path)
    with pytest.raises(ValueError, match="search anew"):
        replace(schedule, mask=(True, False))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [20, 15, 10])  # at 7 a second-order solver is a little better, see the README
def test_shipped_schedules_beat_both_solvers_with_fewer_steps(shipped, budget):
    """On noise that no search saw, at equal evaluations, in the distance to the uncached run."""
    pipe = shipped("fashion")

    def sample(steps):
        return generation_tasks(run_of(*map(str, range(10)), steps=steps), first=77_000)[0].run(pipe)

    full, fewer = sample(50), sample(budget)
    technique = ScheduledCache(f"fashion-{budget}")
    technique.apply(pipe)
    cached = sample(50)
    assert step_cache_report(pipe).computed == {"cond": budget, "uncond": budget}
    technique.remove(pipe)
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)
    second_order = sample(budget)
    off = float(relative_error(cached, full).mean())
    assert off < float(relative_error(second_order, full).mean())
    assert off < float(relative_error(fewer, full).mean())
