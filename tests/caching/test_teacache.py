"""TeaCache: the rule is the paper's formula, the limits are exact, and each kind of curve is looked at before use."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from caching.passes import decisions, stack_pass
from caching.pipelines import generate, inputs_at, run_of, small_pipeline
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_pipeline

from diffusion_opt.caching import TeaCache, calibrate_step_cache, step_cache_report
from diffusion_opt.caching.rules import TeaCacheRule
from diffusion_opt.caching.step.stack import attached_cut


def calibrated(pipe: DiffusionPipeline, folder: Path) -> str:
    """The path of a fresh calibration at six steps and guidance 2."""
    found = calibrate_step_cache(pipe, run_of("0", "1", "2"))
    found.save(folder / "calibration.json")
    return str(folder / "calibration.json")


def test_the_rule_is_the_formula():
    def curve(change):
        return 2 * change

    m = torch.rand(9, 1, 5, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    rule, passes = TeaCacheRule(1.5, curve), [stack_pass(modulated) for modulated in m]
    found = decisions(rule, passes, forced=(0, 3))
    expected, accumulated = "", 0.0
    for i in range(9):
        if i:
            accumulated += 2 * float((m[i] - m[i - 1]).abs().mean() / m[i - 1].abs().mean())
        skip = i not in (0, 3) and accumulated < 1.5
        accumulated = accumulated if skip else 0.0
        expected += "." if skip else "#"
    assert found == expected
    assert "." in found[4:]
    assert "#" in found[4:]
    rule.start()
    assert rule.accumulated == 0
    assert rule.skip(passes[0], forced=False)  # the first step of a generation has nothing to compare with


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
def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="one of reuse, forecast, quadratic, hermite, got 'taylor'"):
        TeaCache(0.1, predictor="taylor")
    with pytest.raises(ValueError, match="isotonic or polynomial, got 'spline'"):
        TeaCache(0.1, curve="curve.json", fit="spline")


def test_a_calibrated_curve_serves_its_own_model_and_run_only(pipe, tmp_path):
    path = calibrated(pipe, tmp_path)
    technique = TeaCache(100.0, "reuse", path)
    assert technique.describe() == "TeaCache at 100 with reuse, calibrated"
    with pytest.raises(ValueError, match=r"calibrated on model [0-9a-f]{16}, this one is"):
        technique.apply(small_pipeline(seed=1))
    technique.apply(pipe)
    generate(pipe, steps=6, guidance=2.0)
    assert step_cache_report(pipe).total_skipped > 0
    with pytest.raises(ValueError, match=r"with 6 steps, this run is .* with 7 steps"):
        generate(pipe, steps=7)
    generate(pipe)
    with pytest.raises(FileNotFoundError, match=r"no calibration named nowhere\.json"):
        TeaCache(0.1, curve="nowhere.json").apply(small_pipeline())


def test_the_two_fits_of_a_calibration_are_used_as_chosen(pipe, tmp_path):
    path = calibrated(pipe, tmp_path)
    stored = json.loads(Path(path).read_text())
    stored["curve"] = {"changes": [0.0, 1.0], "rescaled": [0.0, 0.0]}  # nothing ever changes: skip all
    stored["polynomial"] = {"coefficients": [100.0]}  # everything does: skip none
    Path(path).write_text(json.dumps(stored))
    computed = {}
    for fit in ("isotonic", "polynomial"):
        technique = TeaCache(1.0, "reuse", path, fit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generate(technique.apply(pipe))
        computed[fit] = step_cache_report(pipe).computed["cond"]
        technique.remove(pipe)
    assert computed == {"isotonic": 2, "polynomial": 6}
    assert TeaCache(1.0, "reuse", path, "polynomial").describe().endswith("with reuse, calibrated polynomial")
    with pytest.raises(ValueError, match="'identity' is none"):
        TeaCache(1.0, fit="polynomial")


def test_polynomials_warn_before_they_are_used(pipe, tmp_path):
    technique = TeaCache(0.5, curve="FLUX.1-dev")
    assert technique.describe() == "TeaCache at 0.5 with forecast, polynomial of FLUX.1-dev"
    with pytest.raises(ValueError, match="fitted to a FluxTransformer2DModel"):
        technique.apply(pipe)
    flux = tiny_pipeline("flux")
    with pytest.warns(UserWarning, match="polynomial 'FLUX.1-dev' .* is falling"):
        technique.apply(flux)
    technique.remove(flux)
    path = calibrated(pipe, tmp_path)
    stored = json.loads(Path(path).read_text()) | {"polynomial": {"coefficients": [1.0, -0.5]}}
    Path(path).write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match="is negative .* calibrate on the model at hand"):
        TeaCache(0.5, curve=path, fit="polynomial").apply(pipe)


@torch.no_grad()
def test_a_calibrated_curve_in_a_custom_loop_counts_as_unguided(pipe, tmp_path):
    fresh = small_pipeline()
    TeaCache(0.1, curve=calibrated(pipe, tmp_path)).apply(fresh)
    fresh.scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match=r"for guidance 2, this run has guidance 1"):
        fresh.transformer(**inputs_at(1.0))
    with pytest.warns(UserWarning, match="a loop without a schedule cannot be compared"):
        fresh.transformer(**inputs_at(0.5))  # a time that the scheduler does not have


@torch.no_grad()
def test_a_wrong_model_is_refused_before_anything_changes(pipe, tmp_path):
    path = calibrated(pipe, tmp_path)
    stored = json.loads(Path(path).read_text())
    stored["run"]["model"] = "f" * 16
    Path(path).write_text(json.dumps(stored))
    expected = pipe.transformer(**inputs_at(0.5))[0]
    with pytest.raises(ValueError, match="calibrate anew"):
        TeaCache(0.1, curve=path).apply(pipe)
    assert attached_cut(pipe.transformer) is None
    assert torch.equal(pipe.transformer(**inputs_at(0.5))[0], expected)
