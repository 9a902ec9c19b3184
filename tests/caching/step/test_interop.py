"""Export: the numbers arrive where they are meant to, and what cannot be meant is refused."""

import pytest
from caching.calibrations import calibration_of, saved
from caching.pipelines import generate

from diffusion_opt.caching import FixedSchedule, MagCache
from diffusion_opt.caching.step.interop import cache_dit_mask, from_cache_dit_mask, mag_cache_config


def test_a_mag_cache_configuration_carries_ratios_and_settings(pipe, tmp_path):
    """That diffusers then decides as we do is tested with the rule itself."""
    generate(pipe)
    ratios = (1.0, 1.3, 1.1, 1.0, 0.9, 0.8)
    technique = MagCache(0.2, saved(calibration_of(pipe, ratios=ratios), tmp_path), max_skips=2, retention=0.3)
    config = mag_cache_config(technique)
    assert config.mag_ratios.tolist() == pytest.approx(ratios)
    assert (config.threshold, config.max_skip_steps, config.retention_ratio) == (0.2, 2, 0.3)
    assert config.num_inference_steps == 6


def test_a_mask_goes_to_cache_dit_and_back():
    schedule = FixedSchedule((True, True, False, False, True), "forecast")
    exported = cache_dit_mask(schedule)
    assert exported == {
        "num_inference_steps": 5,
        "steps_computation_mask": [1, 1, 0, 0, 1],
        "steps_computation_policy": "static",
    }
    assert from_cache_dit_mask(exported["steps_computation_mask"]) == schedule
    with pytest.raises(ValueError, match=r"ones \(compute\) and zeros \(cache\), got \[1, 2\]"):
        from_cache_dit_mask([1, 2])
    with pytest.raises(ValueError, match="begin with a computed step"):
        from_cache_dit_mask([0, 1, 1])
