"""The techniques as recipes see them: settings, one line, on and off."""

import json
from dataclasses import asdict

import pytest
import torch
from caching.region.models import CASES
from diffusers import DiffusionPipeline
from small_pipelines import generate, small_pipeline

from diffusion_opt.caching.region import (
    ChunkRegionCache,
    EditRegionCache,
    GenerationRegionCache,
    ReferenceRegionCache,
    StreamingRegionCache,
    region_report,
    reset_region_cache,
    set_region,
)

TECHNIQUES = [
    StreamingRegionCache(ring=2, precision="fp8"),
    EditRegionCache(refresh_every=2),
    GenerationRegionCache(share=0.25),
    ReferenceRegionCache(offload=True),
    ChunkRegionCache(0.2),
]


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: type(t).__name__)
def test_settings_round_trip_and_removal_restores_every_bit(technique):
    assert type(technique)(**json.loads(json.dumps(asdict(technique)))) == technique
    assert technique.describe()
    pipe = small_pipeline()
    before = generate(pipe)
    assert technique.apply(pipe) is pipe
    technique.remove(pipe)
    assert torch.equal(generate(pipe), before)
    with pytest.raises(ValueError, match="no region cache"):
        technique.remove(pipe)


def test_the_line_says_how_slots_are_stored():
    assert StreamingRegionCache(precision="fp8", offload=True).describe().endswith("probe 10%, fp8, offloaded")
    assert EditRegionCache().describe() == "edit region cache, ring 1, all tokens every 4 steps"


@pytest.mark.parametrize("limit", [GenerationRegionCache(refresh_every=1), ChunkRegionCache(0.0)])
def test_the_identity_limits_change_no_bit_with_guidance(limit):
    pipe = small_pipeline()
    before = generate(pipe, steps=4)
    limit.apply(pipe)
    assert torch.equal(generate(pipe, steps=4), before)
    assert region_report(pipe).work == 1


def test_plain_generation_computes_the_share_it_says_for_both_contexts():
    pipe = GenerationRegionCache(share=0.5, refresh_every=3).apply(small_pipeline())
    before = generate(pipe, steps=6)
    computed = [(p.context, p.num_computed) for p in region_report(pipe).passes]
    assert computed == [(name, n) for n in (16, 8, 8, 16, 8, 8) for name in ("cond", "uncond")]
    assert torch.equal(generate(pipe, steps=6), before), "nothing survives a generation"


def test_two_pipelines_share_nothing():
    one, two = small_pipeline(), small_pipeline(seed=1)
    expected = generate(two)
    technique = GenerationRegionCache(share=0.5, refresh_every=3)
    technique.apply(one)
    generate(one)
    assert torch.equal(generate(two), expected)
    technique.apply(two)
    assert region_report(two).passes == ()


def test_reset_forgets_slots_and_conditions():
    pipe = StreamingRegionCache(probe=0.0).apply(small_pipeline())
    generate(pipe)
    assert region_report(pipe).slot_bytes > 0
    generate(pipe)
    assert region_report(pipe).work == 0, "the same pictures again"
    reset_region_cache(pipe)
    assert region_report(pipe).slot_bytes == 0
    generate(pipe)
    assert region_report(pipe).work == 1


def test_wrong_settings_say_what_is_allowed():
    for build, message in [
        (lambda: StreamingRegionCache(ring=-1), "ring must be 0 or more, got -1"),
        (lambda: StreamingRegionCache(probe=1.5), "probe is a share"),
        (lambda: StreamingRegionCache(alarm=0.0), "alarm above 0"),
        (lambda: EditRegionCache(refresh_every=0), "refresh_every must be 1 or more, got 0"),
        (lambda: GenerationRegionCache(share=2.0), "share is a share"),
        (lambda: ChunkRegionCache(-0.1), "got -0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    pipe = EditRegionCache().apply(small_pipeline())
    with pytest.raises(ValueError, match="set_region"):
        generate(pipe)
    set_region(pipe, torch.ones(16, dtype=torch.bool))
    assert generate(pipe).shape == (3, 1, 16, 16)


def test_every_family_takes_a_technique():
    for case in CASES.values():
        pipe = DiffusionPipeline()
        pipe.transformer = case.made()
        StreamingRegionCache(ring=0, probe=0.0).apply(pipe)
        with torch.no_grad(), pipe.transformer.cache_context("cond"):
            pipe.transformer(**case.call(0.7))
            pipe.transformer(**case.call(0.7))
        assert region_report(pipe).work in (0, 0.125), "the same input again; audio needs a pass"
