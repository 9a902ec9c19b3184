"""MagCache: the paper's sums, by hand and as diffusers takes them on the same ratios."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from caching.calibrations import calibration_of, saved
from caching.passes import decisions, plain
from caching.pipelines import generate, small_pipeline
from diffusers import DiffusionPipeline
from small_transformers import family_pipeline, family_sample

from diffusion_opt.caching import MagCache, step_cache_report
from diffusion_opt.caching.rules import MagnitudeRule
from diffusion_opt.caching.step.interop import mag_cache_config
from diffusion_opt.models.block_stack import block_stack

RATIOS = (1.0, 1.3, 1.1, 1.0, 0.9, 1.05, 1.02, 1.0, 0.99, 0.97, 0.8, 2.5)


def test_the_sums_by_hand():
    """From step 2 on (retention), with threshold 0.25 and at most 2 skips:

    2: R 1.1   e .1   skip     3: R 1.1   e .2   skip     4: R .99   e .21  third skip: compute
    5: R 1.05  e .05  skip     6: R 1.071 e .121 skip     7: R 1.071 e .192 third skip: compute
    8: R .99   e .01  skip     9: R .9603 e .0497 skip    10: R .76824 e .281 compute     11: R 2.5 e 1.5 compute
    """
    assert decisions(MagnitudeRule(0.25, RATIOS, max_skips=2), plain(12)) == "##..#..#..##"


def test_retention_is_rounded_and_forcing_starts_the_sums_anew():
    ones = (1.0,) * 10
    assert decisions(MagnitudeRule(0.1, ones, 9, retention=0.34), plain(10)) == "###......."
    assert decisions(MagnitudeRule(0.1, ones, 9, retention=0.35), plain(10)) == "####......"
    assert decisions(MagnitudeRule(0.1, ones, 2, retention=0.0), plain(10), forced=(0, 2, 8)) == "#.#..#..#."
    assert decisions(MagnitudeRule(0.0, ones, 9, retention=0.0), plain(10)) == "##########"
    assert decisions(MagnitudeRule(0.25, (1.0, 1.25), retention=0.0), plain(2)) == "#."  # at the threshold: skipped
    rule = MagnitudeRule(0.1, ones, 9)
    for _ in range(2):
        rule.start()
        assert decisions(rule, plain(10)) == "##........"
    with pytest.raises(ValueError, match="ratios for 10 steps, this run has more"):
        decisions(rule, plain(1))


def second_block_ran(pipe: DiffusionPipeline, steps: int) -> tuple[list[bool], torch.Tensor]:
    """Pass by pass, whether the second block ran, and what was generated."""
    ran, block = [], block_stack(pipe.transformer).blocks[1]
    inside = next(module for name, module in block.named_modules() if name in ("attn", "attn1"))
    handles = [
        pipe.transformer.register_forward_pre_hook(lambda module, args: ran.append(False)),
        inside.register_forward_pre_hook(lambda module, args: ran.__setitem__(-1, True)),
    ]
    sample = family_sample(pipe, steps=steps)
    for handle in handles:
        handle.remove()
    return ran, sample


@pytest.mark.parametrize("family", ["flux2", "wan"])
@pytest.mark.parametrize("threshold", [0.12, 0.25, 0.6])
def test_decisions_and_pictures_are_those_of_diffusers(family, threshold, tmp_path):
    """Two passes of guidance, each with a state of its own there; the last ratio makes both compute the last step."""
    pipe = family_pipeline(family)
    family_sample(pipe, steps=len(RATIOS))
    path = saved(calibration_of(pipe, ratios=RATIOS), tmp_path)
    technique = MagCache(threshold, path, "reuse")
    pipe.transformer.enable_cache(mag_cache_config(technique))
    theirs, their_sample = second_block_ran(pipe, len(RATIOS))
    pipe.transformer.disable_cache()
    ours, our_sample = second_block_ran(technique.apply(pipe), len(RATIOS))
    assert ours == theirs
    assert 8 < sum(ours) < 2 * len(RATIOS)
    torch.testing.assert_close(our_sample, their_sample, rtol=1e-4, atol=1e-4)


def test_threshold_zero_changes_no_bit_and_more_skips_more(pipe, tmp_path):
    dense = generate(pipe)
    path, computed = saved(calibration_of(pipe), tmp_path), []
    for threshold in (0.0, 0.06, 0.12, 1.0):
        technique = MagCache(threshold, path, "reuse", retention=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = generate(technique.apply(pipe))
        computed.append(step_cache_report(pipe).computed["cond"])
        technique.remove(pipe)
        assert torch.equal(images, dense) == (threshold == 0)
    assert computed == [6, 4, 4, 3]  # |1 - 1.05| = .05; with the next .1525; four in a row, but three at most


def test_ratios_serve_their_own_model_and_run_only(pipe, tmp_path):
    generate(pipe)
    technique = MagCache(0.1, saved(calibration_of(pipe), tmp_path))
    with pytest.raises(ValueError, match="calibrated on model"):
        technique.apply(small_pipeline(seed=1))
    technique.apply(pipe)
    with pytest.raises(ValueError, match=r"with 6 steps, this run is .* with 7 steps"):
        generate(pipe, steps=7)


def test_settings_round_trip_and_bad_ones_are_refused():
    technique = MagCache(0.1, "ratios.json", max_skips=2)
    assert MagCache(**json.loads(json.dumps(asdict(technique)))) == technique
    assert technique.describe() == "MagCache at 0.1 with forecast, at most 2 skips in a row"
    for settings, message in (
        ({"threshold": -0.1}, "threshold must be 0"),
        ({"max_skips": 0}, "max_skips must be 1 or more, 3 as published, got 0"),
        ({"retention": 1.5}, "got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            MagCache(**{"threshold": 0.1, "calibration": "ratios.json"} | settings)
