"""The comparison is fair: one currency that adds up, budgets that are kept, judges that agree with themselves."""

from dataclasses import replace
from io import StringIO

import pytest
import torch
from caching.pipelines import generate, run_of, small_pipeline
from rich.console import Console
from small_transformers import family_pipeline

from diffusion_opt.caching import FixedSchedule
from diffusion_opt.caching.comparison.baselines import CannotRunError
from diffusion_opt.caching.comparison.compare import Comparison, Line, compare, conclude, lines, timed_name
from diffusion_opt.caching.comparison.contest import Contest, Setting, scheduled, uncached
from diffusion_opt.caching.comparison.contestants import Chosen, Tuned, _taylor_steps, contestants, equal_change_mask
from diffusion_opt.caching.schedules.search import SearchSettings, even_mask

RUN = run_of("0", "1", "2")
SEARCH = SearchSettings(trials=1, amplify_every=0, max_gap=4)


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline(num_double=1, num_single=2)


@pytest.fixture(scope="module")
def contest(pipe):
    return Contest(pipe, RUN, num_samples=2, batch_size=2, tuning_samples=2, fine_steps=12, progress=False)


def cost(contest: Contest, setting: Setting) -> float:
    return contest.spent(setting, contest.tasks(setting.steps))[1]


def test_plain_runs_cost_their_steps(contest):
    assert cost(contest, contest.full("euler")) == RUN.num_inference_steps
    assert cost(contest, Setting("three", 3, "adams_bashforth2")) == 3


@pytest.mark.parametrize("computed", [1, 3, 6])
def test_a_schedule_costs_its_steps_and_the_ends_of_the_skipped(contest, computed):
    schedule = FixedSchedule(even_mask(RUN.num_inference_steps, computed), "reuse")
    expected = computed + (RUN.num_inference_steps - computed) * contest.skipped_step
    assert cost(contest, scheduled(schedule, "euler")) == pytest.approx(expected, rel=1e-9)
    assert 0 < contest.skipped_step < 0.2


def test_affordable_is_the_most_that_fits(contest):
    for budget in (2, 3, 5, 5.5, 6):
        fits = [n for n in range(1, 7) if n + (6 - n) * contest.skipped_step <= budget + 1e-9]
        assert contest.affordable(budget) == max(fits)
    with pytest.raises(ValueError, match=r"a cached run of 6 steps costs 1\.\d\d full steps or more, got 1"):
        contest.affordable(1)


def test_judges_agree_with_themselves_and_see_what_differs(contest):
    errors = contest.errors(contest.outputs(contest.full("euler")))
    assert errors["euler"] == 0
    assert 0 < errors["adams_bashforth2"]
    assert 0 < errors["ode"]
    second_order = contest.errors(contest.outputs(contest.full("adams_bashforth2")))
    assert second_order["ode"] < errors["ode"]


def test_held_out_and_tuning_noises_differ_and_more_samples_begin_alike(contest):
    few, more = (contest.outputs(Setting("plain", 1), number) for number in (2, 4))
    assert torch.equal(more[:2], few)
    assert not torch.equal(contest.sample(Setting("plain", 1), contest.tuning_task(1)), few)


class Priced(Contest):
    """A contest in which a threshold costs what a function says."""

    def __init__(self, price):
        self.price = price
        self.run, self.steps = RUN, RUN.num_inference_steps
        self.asked = []
        self.skipped_step = 0.0

    def tuning_cost(self, setting: Setting) -> float:
        self.asked.append(float(setting.label))
        return self.price(self.asked[-1])


def steps_at(threshold: float) -> float:
    """8 steps at threshold 0, one less for each 0.03, two at least."""
    return float(max(2, 8 - int(threshold / 0.03)))


@pytest.mark.parametrize("budget", [3, 4, 7])
def test_a_threshold_is_raised_until_one_more_step_would_not_fit(budget):
    tuned = Tuned("rule", lambda threshold: (uncached, repr(threshold)))
    found = float(tuned.spend(Priced(steps_at), budget).label)
    assert steps_at(found) == budget


def test_a_threshold_that_cannot_keep_the_budget_says_so():
    contest = Priced(steps_at)
    with pytest.raises(CannotRunError, match=r"it takes 2\.0 full steps or more, whatever the threshold"):
        Tuned("rule", lambda threshold: (uncached, repr(threshold))).spend(contest, 1)
    assert len(contest.asked) == 1


def test_of_discrete_settings_the_best_that_fits_is_chosen(contest):
    masks = ("##....", "#..#..", "####..", "######")
    settings = [scheduled(FixedSchedule([m == "#" for m in mask], "reuse"), "euler") for mask in masks]
    chosen = Chosen("masks", lambda budget: settings)
    assert chosen.spend(contest, 3) is settings[1]
    assert chosen.spend(contest, 6) is settings[3]
    with pytest.raises(CannotRunError, match=r"it takes 2\.\d full steps or more"):
        chosen.spend(contest, 2)
    with pytest.raises(CannotRunError, match="none of its settings computes 2 steps or fewer"):
        Chosen("masks", lambda budget: []).spend(contest, 2)


def test_the_steps_of_taylor_seer_are_those_that_diffusers_computes(pipe, contest):
    from diffusion_opt.caching.comparison.baselines import taylor_seer

    setting = Setting("", RUN.num_inference_steps, scope=taylor_seer(3, 3).on)
    computed = _taylor_steps(RUN.num_inference_steps, 3, 3)
    assert computed < cost(contest, setting) < computed + (RUN.num_inference_steps - computed) * 0.2


def test_steps_of_equal_change():
    assert equal_change_mask([1.0] * 5, 3) == (True, False, True, False, True, False)
    assert equal_change_mask([4.0, 2.0, 1.0, 1.0, 0.0], 4) == (True, True, True, True, False, False)
    assert equal_change_mask([0.0, 0.0, 0.0, 9.0], 3) == (True, False, False, True, True)
    assert all(equal_change_mask([1.0, 3.0, 0.5], number).count(True) == number for number in range(1, 5))


ONLY = (
    "fewer Euler steps",
    "diffusers FirstBlockCache",
    "step table, reuse",
    "even spacing, forecast",
    "searched, forecast",
)


@pytest.fixture(scope="module")
def comparison(pipe):
    return compare(pipe, (4,), 2, run=RUN, search=SEARCH, only=ONLY, rounds=1, progress=False)


def test_every_policy_keeps_every_budget(comparison):
    assert [(line.policy, line.budget) for line in comparison.lines] == [(p, b) for b in (4,) for p in ONLY]
    for line in comparison.lines:
        if line.reason is None:
            assert line.budget - 1 < line.spent <= line.budget, line
            assert all(error > 0 for error in line.errors.values())
    reasons = {line.policy for line in comparison.lines if line.reason}
    assert reasons == {"diffusers FirstBlockCache"}
    assert comparison.teacher_errors["euler"]["euler"] == 0


def test_time_stands_beside_arithmetic(comparison):
    ratios = comparison.time_ratios()
    assert set(ratios) == {timed_name(line) for line in comparison.lines if line.reason is None}
    assert ratios["fewer Euler steps @ 4"][0] == 4 / 6
    assert all(share > 0 for _, share in ratios.values())


def test_the_table_shows_every_policy_and_why_one_is_missing(comparison):
    console = Console(width=200, record=True, file=StringIO())
    console.print(comparison.table())
    text = console.export_text()
    assert text.count("What 4 of 6 steps can buy") == 1
    assert text.count("searched, forecast") == 1
    assert "FirstBlockCache at 1e+06 fails on Flux2" in text


def test_it_is_saved_and_read(comparison, tmp_path):
    comparison.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == comparison
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no comparison"):
        Comparison.load(tmp_path / "other.json")


def test_known_lines_are_kept_and_can_be_run_again(contest, comparison):
    known = {(line.policy, line.budget): line for line in comparison.lines}
    made = list(lines(contest, (4,), SEARCH, ONLY, known))
    assert [line for line, _ in made] == comparison.at(4)
    for line, setting in made:
        if line.group in ("fewer steps", "even spacing", "searched"):
            assert cost(contest, setting) == pytest.approx(line.spent, rel=1e-9)
            assert contest.errors(contest.outputs(setting))["euler"] == pytest.approx(line.errors["euler"], rel=1e-5)
        else:
            assert setting is None


def test_the_pipeline_is_left_as_it_was(pipe):
    before, scheduler = generate(pipe), pipe.scheduler
    only = ("fewer second-order steps", "even spacing, reuse")
    compare(pipe, (4,), 2, run=RUN, search=SEARCH, only=only, rounds=0, progress=False)
    assert pipe.scheduler is scheduler
    assert torch.equal(generate(pipe), before)


def test_bad_input(contest, pipe):
    with pytest.raises(ValueError, match="no policy is called 'magic': there are fewer Euler steps"):
        list(lines(contest, (4,), SEARCH, ("magic",)))
    with pytest.raises(ValueError, match=r"WanPipeline has no classes of its own to ask for: give prompts"):
        Contest(family_pipeline("wan", blocks=2))
    with pytest.raises(ValueError, match="either numbers or a reason"):
        Line("p", "rule", 4, "", None, None, None)
    with pytest.raises(ValueError, match=r"no policy with numbers at a budget of 9"):
        conclude(contest, [], {}).best(9, "ode", ours=True)


def test_ours_are_told_from_the_others(comparison):
    for judge in ("euler", "ode"):
        ours, best = (comparison.best(4, judge, mine) for mine in (True, False))
        assert ours.policy == "searched, forecast"
        assert best.policy != ours.policy
        errors = [line.errors[judge] for line in comparison.at(4) if line.errors and line is not ours]
        assert best.errors[judge] == min(errors)


def test_names_are_unique_and_every_group_takes_part(contest):
    everyone = contestants(contest, SEARCH)
    assert len(everyone) == 27
    groups = [contestant.group for contestant in everyone.values()]
    assert sorted(set(groups), key=groups.index) == [
        "fewer steps", "another library", "rule", "even spacing", "searched",
    ]  # fmt: skip


@pytest.mark.slow
def test_on_the_shipped_model_the_searched_forecast_beats_fewer_steps(shipped):
    run = run_of(*map(str, range(10)), steps=20)
    search = replace(SEARCH, trials=8, max_gap=8)
    only = ("fewer Euler steps", "fewer second-order steps", "even spacing, reuse", "searched, forecast")
    found = compare(shipped("fashion-micro"), (8,), 16, run=run, search=search, only=only, rounds=0, progress=False)
    assert found.best(8, "euler", ours=True).errors["euler"] < found.best(8, "euler", ours=False).errors["euler"]
