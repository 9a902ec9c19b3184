"""What a cache saved and what it keeps: MACs against a count of the real run, bytes against the real anchors."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from small_transformers import FAMILIES, family_pass, family_pipeline, family_sample, small_transformer

from diffusion_opt.caching.guidance_cache import GuidanceCache, guidance_cache_report
from diffusion_opt.caching.step.predictors import PREDICTORS
from diffusion_opt.caching.step.report import StepCacheReport, anchor_bytes, step_cache_report
from diffusion_opt.caching.step.stack import StackCut
from diffusion_opt.caching.step.step_cache import Rule, StepCache
from diffusion_opt.evaluation import count


class Eager(Rule):
    """Skips every other step it may."""

    def __init__(self, probe_blocks: int = 0) -> None:
        self.probe_blocks, self.last = probe_blocks, False

    def start(self):
        self.last = False

    def skip(self, stack, forced):
        self.last = not forced and not self.last
        return self.last


def put(transformer, predictor="forecast", pipe=None, probe_blocks=0) -> StepCache:
    cache = StepCache(Eager(probe_blocks), PREDICTORS[predictor])
    StackCut(transformer, cache, pipe).attach(transformer)
    return cache


@pytest.mark.parametrize(("family", "probe_blocks"), [*((family, 0) for family in FAMILIES), ("wan", 1)])
def test_macs_are_those_of_the_run(family, probe_blocks):
    pipe = family_pipeline(family, blocks=2)
    dense = count(lambda: family_sample(pipe, steps=4), pipe.transformer)
    put(pipe.transformer, pipe=pipe, probe_blocks=probe_blocks)
    cached = count(lambda: family_sample(pipe, steps=4), pipe.transformer)
    report = step_cache_report(pipe, count_macs=True)
    assert (report.dense_macs, report.used_macs) == (dense.macs, cached.macs)
    assert report.saved == pytest.approx(1 - cached.macs / dense.macs)
    assert f"{report.saved:.1%} of {dense.macs / 1e9:.3g} GMACs saved" in str(report)
    images = family_sample(pipe, steps=4)
    step_cache_report(pipe, count_macs=True)
    assert torch.equal(family_sample(pipe, steps=4), images)  # counting leaves nothing behind


def test_counting_goes_past_a_guidance_cache():
    pipe = family_pipeline("wan", blocks=2)
    put(pipe.transformer, pipe=pipe)
    GuidanceCache(2).apply(pipe)
    family_sample(pipe, steps=10)
    before = guidance_cache_report(pipe)
    macs = step_cache_report(pipe, count_macs=True).macs
    assert macs["cond"] == macs["uncond"]
    assert guidance_cache_report(pipe) == before


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_anchor_bytes_are_those_kept(family):
    transformer = small_transformer(family)
    cache = put(transformer, "forecast")
    for i in range(4):
        transformer(**family_pass(family, 0.9 - 0.1 * i, seed=i))
    kept = [anchor.residual for anchor in cache._thread.state.anchors["default"]]
    tokens = {name: residual.shape[1] for name, residual in kept[0].items()}
    held = sum(residual.numel() * residual.element_size() for anchor in kept for residual in anchor.values())
    assert anchor_bytes(transformer, tokens, batch=2, num_anchors=2) == held
    assert anchor_bytes(transformer, tokens, batch=2, num_contexts=2) == 2 * held


def test_anchor_bytes_of_a_large_model_without_its_weights():
    """FLUX.2 [dev], 1,024 x 1,024 pixels: width 48 x 128, 4,096 image tokens, 2 bytes."""
    with torch.device("meta"):
        flux2 = Flux2Transformer2DModel(num_layers=1, num_single_layers=1).to(torch.bfloat16)
    assert anchor_bytes(flux2, {"hidden": 4096}, num_anchors=1) == 4096 * 48 * 128 * 2
    with pytest.raises(ValueError, match=r"has the streams \['hidden'\], got tokens of \['video'\]"):
        anchor_bytes(flux2, {"video": 9})


def test_nothing_to_report_says_so():
    assert str(StepCacheReport({})) == "no passes yet"
    with pytest.raises(ValueError, match="count_macs=True"):
        _ = StepCacheReport({"cond": ((1.0, True),)}).saved
    pipe = family_pipeline("wan")
    with pytest.raises(ValueError, match="no step cache on this pipeline"):
        step_cache_report(pipe)
    put(pipe.transformer)
    with pytest.raises(ValueError, match="no pass has run yet"):
        step_cache_report(pipe, count_macs=True)
