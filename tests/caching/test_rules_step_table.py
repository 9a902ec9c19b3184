"""The control: a table looked up by the number of the step, summed as TeaCache sums."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from caching.calibrations import calibration_of, saved
from caching.passes import decisions, plain
from caching.pipelines import generate, small_pipeline

from diffusion_opt.caching import StepTable, step_cache_report
from diffusion_opt.caching.rules import StepTableRule

TABLE = (0.3, 0.2, 0.1, 0.05, 0.1, 0.4, 0.1)


def test_the_sum_by_hand():
    """Below 0.35: .3 skips, .5 computes; .1, .15, .25 skip, .65 computes; .1 skips."""
    assert decisions(StepTableRule(0.35, TABLE), plain(8)) == "#.#...#."
    assert decisions(StepTableRule(0.35, TABLE), plain(8), forced=(0, 3)) == "#.##..#."
    assert decisions(StepTableRule(0.0, (0.0,) * 7), plain(8)) == "########"


def test_a_longer_run_is_refused_and_a_generation_starts_afresh():
    rule = StepTableRule(0.35, TABLE)
    for _ in range(2):
        rule.start()
        assert decisions(rule, plain(8)) == "#.#...#."
    with pytest.raises(ValueError, match="knows 8 steps, this run has more"):
        decisions(rule, plain(1))


def test_threshold_zero_changes_no_bit_and_more_skips_more(pipe, tmp_path):
    dense = generate(pipe)
    path, computed = saved(calibration_of(pipe), tmp_path), []
    for threshold in (0.0, 0.15, 0.25, 9.0):
        technique = StepTable(threshold, path, "reuse")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = generate(technique.apply(pipe))
        computed.append(step_cache_report(pipe).computed["cond"])
        technique.remove(pipe)
        assert torch.equal(images, dense) == (threshold == 0)
    assert computed == [6, 4, 3, 2]


def test_a_table_serves_its_own_model_and_run_only(pipe, tmp_path):
    generate(pipe)
    technique = StepTable(0.1, saved(calibration_of(pipe), tmp_path))
    with pytest.raises(ValueError, match="calibrated on model"):
        technique.apply(small_pipeline(seed=1))
    technique.apply(pipe)
    with pytest.raises(ValueError, match="this run has guidance 3"):
        generate(pipe, guidance=3.0)


def test_settings_round_trip():
    technique = StepTable(0.1, "table.json", "hermite")
    assert StepTable(**json.loads(json.dumps(asdict(technique)))) == technique
    assert technique.describe() == "step table at 0.1 with hermite"
