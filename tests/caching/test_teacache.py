"""TeaCache: the rule is the paper's formula, the limits are exact, and calibration measures what it says."""

import dataclasses
import json
import warnings
from itertools import pairwise

import pytest
import torch
from caching.pipelines import generate, inputs_at, small_pipeline
from torch import nn

from diffusion_opt.caching import TeaCache, TeaCacheCurve, calibrate_teacache, step_cache_report
from diffusion_opt.caching.stack import StackInput, attached_cut
from diffusion_opt.caching.teacache import TeaCacheRule
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler


def stack_of(hidden: torch.Tensor) -> StackInput:
    """A pass whose modulated input is `hidden` itself: no norm, scale 0, shift 0."""
    block = nn.Module()
    block.norm1 = nn.Identity()
    return StackInput("cond", None, 0.5, hidden, 1, torch.zeros(len(hidden), 6 * hidden.shape[-1]), block)


def calibrated(pipe, steps=6, guidance=2.0) -> TeaCacheCurve:
    return calibrate_teacache(pipe, ["0", "1", "2"], steps, guidance, torch.Generator().manual_seed(3), batch_size=2)


def test_the_rule_is_the_formula():
    def curve(change):
        return 2 * change

    m = torch.rand(9, 1, 5, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    forced = [True, False, False, True, False, False, False, False, False]
    rule = TeaCacheRule(1.5, curve)
    found = [rule.skip(stack_of(m[i]), forced[i]) for i in range(9)]
    expected, accumulated = [], 0.0
    for i in range(9):
        if i:
            accumulated += 2 * float((m[i] - m[i - 1]).abs().mean() / m[i - 1].abs().mean())
        skip = not forced[i] and accumulated < 1.5
        accumulated = accumulated if skip else 0.0
        expected.append(skip)
    assert found == expected
    assert True in found[4:]
    assert False in found[4:]
    rule.start(None)
    assert rule.accumulated == 0
    assert rule.skip(stack_of(m[0]), forced=False)  # the first step of a generation has nothing to compare with


@pytest.mark.parametrize("predictor", ["reuse", "forecast"])
def test_threshold_zero_and_removal_change_no_bit(pipe, predictor):
    dense = generate(pipe)
    technique = TeaCache(0.0, predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked to skip nothing, so nothing to warn of
        assert technique.apply(pipe) is pipe
        assert torch.equal(generate(pipe), dense)
    assert step_cache_report(pipe).total_skipped == 0
    technique.remove(pipe)
    TeaCache(3.0, predictor).apply(pipe)
    assert not torch.equal(generate(pipe), dense)
    TeaCache(3.0, predictor).remove(pipe)
    assert torch.equal(generate(pipe), dense)
    assert attached_cut(pipe.transformer) is None


def test_a_higher_threshold_computes_less(pipe):
    computed = []
    for threshold in (0.0, 0.5, 1.0, 2.0, 100.0):
        technique = TeaCache(threshold, "reuse")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generate(technique.apply(pipe), steps=10)
        computed.append(step_cache_report(pipe).computed["cond"])
        technique.remove(pipe)
    assert computed == sorted(computed, reverse=True)
    assert (computed[0], computed[-1]) == (10, 2)
    assert len(set(computed)) > 2


def test_one_pass_guidance_and_a_single_image(pipe):
    TeaCache(100.0, "forecast").apply(pipe)
    generate(pipe, steps=8, guidance=1.0, batch=1)
    assert step_cache_report(pipe).computed == {"cond": 3}


def test_settings_round_trip_and_bad_ones_are_refused(pipe):
    technique = TeaCache(0.25, "reuse")
    assert TeaCache(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
    assert technique.describe() == "TeaCache at 0.25 with reuse"
    for threshold in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"got {threshold}"):
            TeaCache(threshold)
    with pytest.raises(ValueError, match="no step cache on this pipeline to remove"):
        technique.remove(pipe)
    technique.apply(pipe)
    with pytest.raises(ValueError, match="already on this transformer"):
        technique.apply(pipe)


@pytest.mark.wrong_shapes
def test_an_unknown_predictor_is_refused():
    with pytest.raises(ValueError, match="one of reuse, forecast, got 'taylor'"):
        TeaCache(0.1, predictor="taylor")


def test_calibration_records_real_changes_and_leaves_the_pipeline_alone(pipe):
    dense = generate(pipe)
    ends = []
    pipe.transformer.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    pipe.transformer.x_embedder.register_forward_hook(lambda m, args, out: ends.append(out))
    curve = calibrate_teacache(pipe, ["0", "1", "2"], 4, 1.0, torch.Generator().manual_seed(3))
    residuals = [end - start for start, end in zip(ends[::2], ends[1::2], strict=True)]
    table = [
        ((new - old).abs().mean((1, 2)) / old.abs().mean((1, 2))).mean().item() for old, new in pairwise(residuals)
    ]
    assert curve.step_table == pytest.approx(table, rel=1e-5)
    assert curve.num_pairs == 9
    assert curve.r2 <= 1
    assert curve.r2_step_table <= 1
    assert torch.equal(generate(pipe), dense)
    assert attached_cut(pipe.transformer) is None
    assert f"R2 {curve.r2:.3f}" in curve.describe()
    assert f"control (mean of each step): R2 {curve.r2_step_table:.3f}" in curve.describe()


def test_calibration_counts_both_branches_and_all_batches(pipe):
    assert calibrated(pipe, steps=5).num_pairs == 3 * 4 * 2
    with pytest.raises(ValueError, match="got 0 prompts"):
        calibrate_teacache(pipe, [], 5, 1.0, torch.Generator())
    with pytest.raises(ValueError, match="num_inference_steps=1"):
        calibrate_teacache(pipe, ["0"], 1, 1.0, torch.Generator())


def test_a_failed_calibration_leaves_no_hook(pipe):
    with pytest.raises(ValueError, match="unknown prompt"):
        calibrate_teacache(pipe, ["zebra"], 4, 1.0, torch.Generator())
    assert attached_cut(pipe.transformer) is None


def test_a_calibrated_curve_serves_its_own_model_and_run_only(pipe, tmp_path):
    path = tmp_path / "curve.json"
    calibrated(pipe).save(path)
    technique = TeaCache(100.0, "reuse", str(path))
    assert technique.describe().endswith(", calibrated")
    with pytest.raises(ValueError, match=r"calibrated on model [0-9a-f]{16}, this one is"):
        technique.apply(small_pipeline(seed=1))
    technique.apply(pipe)
    generate(pipe, steps=6, guidance=2.0)
    assert step_cache_report(pipe).total_skipped > 0
    with pytest.raises(ValueError, match=r"with 6 steps and guidance 2, this run is .* with 7 steps and guidance 2"):
        generate(pipe, steps=7)
    with pytest.raises(ValueError, match=r"this run is .* with 6 steps and guidance 3"):
        generate(pipe, guidance=3.0)
    euler = pipe.scheduler
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(euler.config)
    with pytest.raises(ValueError, match="this run is FlowMatchAdamsBashforthScheduler"):
        generate(pipe)
    pipe.scheduler = euler
    generate(pipe)
    with pytest.raises(FileNotFoundError, match="no TeaCache curve"):
        TeaCache(0.1, curve="nowhere.json").apply(small_pipeline())


@torch.no_grad()
def test_a_calibrated_curve_in_a_custom_loop_counts_as_unguided(pipe, tmp_path):
    calibrated(pipe).save(tmp_path / "curve.json")
    fresh = small_pipeline()
    TeaCache(0.1, curve=str(tmp_path / "curve.json")).apply(fresh)
    with pytest.raises(ValueError, match=r"with 6 steps and guidance 2, this run is .* and guidance 1"):
        fresh.transformer(**inputs_at(0.5))


@torch.no_grad()
def test_a_wrong_model_is_refused_before_anything_changes(pipe, tmp_path):
    path = tmp_path / "curve.json"
    dataclasses.replace(calibrated(pipe), model="f" * 16).save(path)
    expected = pipe.transformer(**inputs_at(0.5))[0]
    with pytest.raises(ValueError, match="calibrate anew"):
        TeaCache(0.1, curve=str(path)).apply(pipe)
    assert attached_cut(pipe.transformer) is None
    assert torch.equal(pipe.transformer(**inputs_at(0.5))[0], expected)
