"""Schedules known beforehand: they do what they say, to the letter, or refuse."""

import json
from dataclasses import asdict

import pytest
import torch
from caching.passes import decisions, plain, stack_pass
from caching.pipelines import generate
from hypothesis import given
from hypothesis import strategies as st

from diffusion_opt.caching import FixedInterval, FixedSchedule, step_cache_report
from diffusion_opt.caching.rules import IntervalRule, MaskRule
from diffusion_opt.caching.rules.fixed import marks


@pytest.mark.parametrize(("every", "expected"), [(1, "########"), (2, "#.#.#.#."), (3, "#..#..#.")])
def test_every_nth_pass_is_computed(every, expected):
    assert decisions(IntervalRule(every), plain(8)) == expected


def test_a_forced_pass_starts_the_interval_anew():
    rule = IntervalRule(3)
    assert decisions(rule, plain(8), forced=(0, 1, 6)) == "##..#.#."
    rule.start()
    assert decisions(rule, plain(3), forced=()) == "..#"  # the cache forces the first, the rule does not


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_mask_is_honored(mask):
    assert decisions(MaskRule(tuple(mask)), plain(len(mask)), forced=()) == marks(mask)


def test_a_told_step_is_preferred_to_counting():
    rule = MaskRule((True, False, True, False, True))
    passes = [stack_pass(step=(index, 5)) for index in (0, 1, 1, 2, 3, 4)]  # step 1 is called twice
    assert decisions(rule, passes) == "#..#.#"


def test_a_run_of_another_length_is_refused():
    rule = MaskRule((True, False, True))
    with pytest.raises(ValueError, match="for 3 steps, this run has 4"):
        decisions(rule, [stack_pass(step=(0, 4))])
    rule.start()
    with pytest.raises(ValueError, match="for 3 steps, this run has 4"):
        decisions(rule, plain(4))


@pytest.mark.parametrize("predictor", ["reuse", "forecast", "quadratic", "hermite"])
def test_the_pipeline_computes_what_the_mask_says(pipe, predictor):
    technique = FixedSchedule((True, True, True, False, True, False, False, True), predictor)
    generate(technique.apply(pipe), steps=8)
    report = step_cache_report(pipe)
    assert {name: marks([ran for _, ran in passes]) for name, passes in report.passes.items()} == {
        "cond": "###.#..#",
        "uncond": "###.#..#",
    }
    with pytest.raises(ValueError, match="for 8 steps, this run has 6"):
        generate(pipe, steps=6)


def test_all_computed_and_removal_change_no_bit(pipe):
    dense = generate(pipe)
    for technique in (FixedInterval(1), FixedSchedule((True,) * 6)):
        assert torch.equal(generate(technique.apply(pipe)), dense)
        technique.remove(pipe)
    technique = FixedInterval(3, "reuse")
    assert not torch.equal(generate(technique.apply(pipe)), dense)
    technique.remove(pipe)
    assert torch.equal(generate(pipe), dense)


def test_settings_round_trip_and_describe():
    for technique in (FixedInterval(3, "reuse"), FixedSchedule((True, True, False, True))):
        assert type(technique)(**json.loads(json.dumps(asdict(technique)))) == technique
    assert FixedInterval(3).describe() == "one step in 3 computed, with forecast"
    assert FixedSchedule([True, True, False, True]).describe() == "steps ##.# (3 of 4 computed) with forecast"


@pytest.mark.parametrize("predictor", ["reuse", "forecast", "quadratic", "hermite"])
def test_a_mask_may_skip_early_and_at_the_end(pipe, predictor):
    """With one anchor every predictor reuses, through two goes a line."""
    early = {}
    for name in (predictor, "reuse", "forecast"):
        technique = FixedSchedule((True, False, False, False, False, False), name)
        early[name] = generate(technique.apply(pipe))
        assert marks([ran for _, ran in step_cache_report(pipe).passes["cond"]]) == "#....."
        technique.remove(pipe)
        technique = FixedSchedule((True, False, True, False, False, False), name)
        early[name + " of two"] = generate(technique.apply(pipe))
        technique.remove(pipe)
    assert torch.equal(early[predictor], early["reuse"])
    if predictor != "reuse":
        assert torch.equal(early[predictor + " of two"], early["forecast of two"])


@pytest.mark.parametrize(("mask", "message"), [((), "got an empty mask"), ((False, True), r"got \.#")])
def test_a_mask_that_could_not_be_honored_is_refused(mask, message):
    with pytest.raises(ValueError, match="begin with a computed step, " + message):
        FixedSchedule(mask)
    with pytest.raises(ValueError, match="every must be 1"):
        FixedInterval(0)
