"""What all step caches share as techniques: one technique serves many pipelines, and says what it cannot serve."""

import pytest
import torch
from caching.pipelines import generate, small_pipeline
from small_transformers import family_pipeline, small_transformer

from diffusion_opt.caching import FixedInterval, TeaCache, calibrate_step_cache, step_cache_report
from diffusion_opt.subjects import Run


def test_one_technique_serves_two_pipelines_without_sharing():
    technique = FixedInterval(3, "reuse")
    one, other = small_pipeline(), small_pipeline(seed=1)
    expected = [generate(technique.apply(small_pipeline(seed=seed))) for seed in (0, 1)]
    technique.apply(one)
    technique.apply(other)
    assert torch.equal(generate(one), expected[0])
    assert torch.equal(generate(other), expected[1])
    assert torch.equal(generate(one), expected[0])
    technique.remove(one)
    with pytest.raises(ValueError, match="no step cache on this pipeline"):
        step_cache_report(one)
    assert step_cache_report(other).total_skipped > 0


def test_caches_do_not_pile_up_and_are_not_removed_twice(pipe):
    TeaCache(0.1).apply(pipe)
    with pytest.raises(ValueError, match="already on this transformer"):
        FixedInterval(2).apply(pipe)
    TeaCache(0.1).remove(pipe)
    with pytest.raises(ValueError, match="no step cache on this pipeline to remove"):
        TeaCache(0.1).remove(pipe)


def test_a_calibration_for_two_transformers_and_a_pipeline_with_none_are_refused():
    wan = family_pipeline("wan")
    wan.transformer_2 = small_transformer("wan", seed=1)
    with pytest.raises(ValueError, match="this WanPipeline has two transformers"):
        calibrate_step_cache(wan, Run("a cat", num_inference_steps=4))
    TeaCache(0.1).apply(wan)  # which needs none serves both
    TeaCache(0.1).remove(wan)
    wan.transformer_2 = None
    wan.transformer = None
    with pytest.raises(ValueError, match="WanPipeline has none"):
        TeaCache(0.1).apply(wan)
