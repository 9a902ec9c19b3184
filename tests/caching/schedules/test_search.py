"""Dynamic programming equals brute force, costs are what a real run does, and the climb only goes down."""

from itertools import combinations, pairwise

import pytest
import torch
from caching.pipelines import run_of, small_pipeline
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching import FixedSchedule
from diffusion_opt.caching.schedules.recording import generation_tasks, record, relative_error
from diffusion_opt.caching.schedules.search import (
    SearchSettings,
    best_schedules,
    climb,
    even_mask,
    fewest_steps,
    measure_costs,
    schedule_error,
    search_mask,
    starting_masks,
    within_budget,
)
from diffusion_opt.caching.schedules.segment_costs import (
    NONE,
    SegmentCosts,
    _interpolated,
    amplification,
    segment_costs,
)


def random_costs(num_steps: int, predictor: str, max_gap: int, seed: int) -> SegmentCosts:
    """A random number for every stretch; 0 where nothing is skipped."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for a in range(num_steps):
        for h in [NONE] if predictor == "reuse" or a == 0 else range(a):
            for j in range(a + 1, min(num_steps, a + max_gap) + 1):
                values[h, a, j] = 0.0 if j == a + 1 else float(torch.rand((), generator=generator)) + (j - a) ** 2 / 9
    return SegmentCosts(num_steps, predictor, max_gap, values)


def cost_of(steps: tuple[int, ...], costs: SegmentCosts, objective: str) -> float:
    """The cost of a row of computed steps, stretch by stretch; infinite where a gap is too long."""
    stretches = []
    for i, (a, j) in enumerate(pairwise((*steps, costs.num_steps))):
        h = NONE if costs.predictor == "reuse" or i == 0 else steps[i - 1]
        stretches.append(costs.values.get((h, a, j), float("inf")))
    return sum(stretches) if objective == "sum" else max(stretches)


def brute_force(costs: SegmentCosts, objective: str) -> dict[int, float]:
    best = {}
    for number in range(costs.num_steps):
        rows = [(0, *chosen) for chosen in combinations(range(1, costs.num_steps), number)]
        cheapest = min(cost_of(row, costs, objective) for row in rows)
        if cheapest < float("inf"):
            best[number + 1] = cheapest
    return best


@given(
    st.integers(2, 9),
    st.sampled_from(["reuse", "forecast", "quadratic"]),
    st.integers(2, 9),
    st.sampled_from(["sum", "minimax"]),
    st.integers(0, 10**6),
)
def test_dynamic_programming_equals_brute_force(num_steps, predictor, max_gap, objective, seed):
    costs = random_costs(num_steps, predictor, max_gap, seed)
    found, best = best_schedules(costs, objective), brute_force(costs, objective)
    assert set(found) == set(best)
    for number, candidate in found.items():
        assert len(candidate.steps) == sum(candidate.mask(num_steps)) == number
        assert candidate.cost == pytest.approx(best[number])
        assert candidate.cost == pytest.approx(cost_of(candidate.steps, costs, objective))
        FixedSchedule(candidate.mask(num_steps), predictor)  # honored by the cache


def test_computing_everything_costs_nothing_and_fewest_steps_keeps_the_error():
    costs = random_costs(10, "forecast", 6, seed=1)
    found = best_schedules(costs)
    assert found[10].cost == 0
    assert fewest_steps(costs, 0.0).steps == tuple(range(10))
    for number, candidate in found.items():
        chosen = fewest_steps(costs, candidate.cost)
        assert chosen.cost <= candidate.cost and len(chosen.steps) <= number
    with pytest.raises(ValueError, match="max_error is a relative error"):
        fewest_steps(costs, -0.1)


def test_impossible_budgets_are_refused():
    costs = random_costs(10, "forecast", 3, seed=1)
    with pytest.raises(ValueError, match="computes 4 … 10 of them, got a budget of 3"):
        within_budget(costs, 3)
    assert len(within_budget(costs, 4).steps) == 4
    with pytest.raises(ValueError, match="a run of one step"):
        best_schedules(SegmentCosts(1, "forecast", 3, {}))


def test_the_climb_finds_the_nearest_minimum_and_keeps_the_first_step():
    wanted = {0, 1, 4, 7, 9}

    def error(mask):
        steps = [step for step, computed in enumerate(mask) if computed]
        assert len(steps) == 5 and steps[0] == 0
        return float(sum(abs(step - goal) for step, goal in zip(steps, sorted(wanted), strict=True)))

    start = tuple(step in (0, 1, 2, 3, 8) for step in range(10))
    found = climb(start, error, torch.Generator().manual_seed(0), trials=60)
    assert {step for step, computed in enumerate(found.mask) if computed} == wanted
    assert found.errors[0] == 7 and found.errors[-1] == 0
    assert list(found.errors) == sorted(found.errors, reverse=True)
    assert climb(start, error, torch.Generator().manual_seed(0), trials=0).mask == start
    assert len(climb((True,) * 10, lambda mask: 0.0, torch.Generator(), trials=5).errors) == 1  # nowhere to go


def test_even_spacing_is_that_of_a_solver_with_fewer_steps():
    assert [step for step, computed in enumerate(even_mask(50, 5)) if computed] == [0, 10, 20, 30, 40]
    assert all(sum(even_mask(13, budget)) == budget and even_mask(13, budget)[0] for budget in range(1, 14))


def test_interpolation_between_probed_steps():
    torch.testing.assert_close(
        _interpolated([2, 4, 7], [1.0, 3.0, 0.0], 9), torch.tensor([1.0, 1, 1, 2, 3, 2, 1, 0, 0])
    )
    assert _interpolated([3], [5.0], 5).tolist() == [5.0] * 5


@pytest.fixture(scope="module")
def calibrated():
    """A small pipeline, a task of 7 steps, and its recording."""
    pipe = small_pipeline(num_double=1, num_single=1)
    (task,) = generation_tasks(run_of("0", "1", steps=7))
    return pipe, task, record(pipe, task)


@pytest.mark.parametrize("predictor", ["reuse", "forecast"])
def test_the_cost_of_one_skip_is_the_error_of_the_real_run(calibrated, predictor):
    """With A_k measured, the estimate for a single skip is no estimate: the errors agree (means of one sample)."""
    pipe, _, _ = calibrated
    (task,) = generation_tasks(run_of("3", steps=7))
    recording = record(pipe, task)
    growth = amplification(pipe, task, predictor, every=2)
    costs = segment_costs(pipe, [recording], predictor, growth, max_gap=2)
    for step in (3, 6):
        mask = tuple(i != step for i in range(7))
        real = float(schedule_error(pipe, mask, predictor, task, recording.output))
        h = NONE if predictor == "reuse" else step - 2
        assert costs.values[h, step - 1, step + 1] == pytest.approx(real, rel=1e-3)


def test_costs_add_up_along_a_gap_and_are_means_over_samples(calibrated):
    pipe, _, recording = calibrated
    one = segment_costs(pipe, [recording], "forecast", max_gap=3)
    twice = segment_costs(pipe, iter([recording, recording]), "forecast", max_gap=3)
    assert twice.values == pytest.approx(one.values)
    assert one.values[1, 2, 3] == 0 < one.values[1, 2, 4] < one.values[1, 2, 5]
    doubled = segment_costs(pipe, [recording], "forecast", torch.full((7,), 2.0), max_gap=3)
    assert doubled.values == pytest.approx({key: 2 * value for key, value in one.values.items()})
    with pytest.raises(ValueError, match="recording or more"):
        segment_costs(pipe, [], "forecast")


@pytest.mark.parametrize("predictor", ["reuse", "quadratic"])
def test_the_search_never_falls_behind_its_start_and_repeats(calibrated, predictor):
    pipe, task, recording = calibrated
    settings = SearchSettings(predictor, max_gap=3, amplify_every=6, trials=3)
    costs = measure_costs(pipe, [task], settings)
    starts = starting_masks(costs, 4)
    assert all(sum(mask) == 4 for mask in starts)
    found = search_mask(pipe, task, recording.output, starts, settings)
    assert sum(found.mask) == 4
    assert found.errors[-1] <= found.errors[0]
    real = relative_error(FixedSchedule(found.mask, predictor).apply(pipe) and task.run(pipe), recording.output)
    FixedSchedule(found.mask, predictor).remove(pipe)
    assert float(real.mean()) == pytest.approx(found.errors[-1])
    assert search_mask(pipe, task, recording.output, starts, settings) == found
    assert torch.equal(task.run(pipe), recording.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictor": "oracle"}, "predictor must be one of"),
        ({"max_gap": 1}, "max_gap must be at least 2"),
        ({"trials": -1}, "must be 0 or more"),
    ],
)
@pytest.mark.wrong_shapes
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**change)


def test_a_run_of_one_step_is_refused():
    (task,) = generation_tasks(run_of("0", steps=1))
    with pytest.raises(ValueError, match="a run of one step"):
        amplification(small_pipeline(), task, "forecast")
