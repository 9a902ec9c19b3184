"""EasyCache: the rate is measured at computed steps, the sum runs over all, both by hand."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from caching.passes import stack_pass
from caching.pipelines import generate

from diffusion_opt.caching import EasyCache, step_cache_report
from diffusion_opt.caching.rules import EasyCacheRule


def run(rule: EasyCacheRule, inputs: list[torch.Tensor], outputs: list[torch.Tensor], forced=(0,)) -> str:
    """Decisions on a run as the cache drives it: asked, then told what was computed, then what came out."""
    said = ""
    for index, (x, v) in enumerate(zip(inputs, outputs, strict=True)):
        stack = stack_pass(sample=x)
        skipped = rule.skip(stack, forced=index in forced)
        if not skipped:
            rule.computed(stack, {"hidden": torch.zeros(1, 5, 3)})
        rule.finished(stack, v)
        said += "." if skipped else "#"
    return said


def constant(*values: float) -> list[torch.Tensor]:
    return [torch.full((1, 4, 2, 3), float(value)) for value in values]


def test_rate_and_sum_by_hand():
    """k = 2 / 1 from passes 0 and 1, so the changes of 2, 3, 4 are 2 * 1 / 4 = .5 each (4 is the last computed output).

    Below 1.2: .5 and 1.0 skip, 1.5 computes at pass 4. There k = |16 - 4| / |5 - 2| = 4, and pass 5 adds 4 * 1 / 16.
    """
    inputs, outputs = constant(1, 2, 3, 4, 5, 6), constant(2, 4, 5, 5, 16, 9)
    assert run(EasyCacheRule(1.2, warmup=0), inputs, outputs) == "##..#."
    assert run(EasyCacheRule(1.2, warmup=3), inputs, outputs) == "###..."  # k = 1 / 1: .2, .4, .6
    assert run(EasyCacheRule(0.5, warmup=0), inputs, outputs) == "###..#"  # 2 computes at .5, then as above
    assert run(EasyCacheRule(0.0, warmup=0), inputs, outputs) == "######"


def test_skipped_outputs_teach_nothing_and_a_generation_starts_afresh():
    rule = EasyCacheRule(1.2, warmup=0)
    inputs = constant(1, 2, 3, 4, 5, 6)
    for _ in range(2):
        assert run(rule, inputs, constant(2, 4, 1e6, 1e6, 16, 9)) == "##..#."
        rule.start()


def test_rates_are_taken_for_each_sample():
    """Sample 0 has rate 2 and size 4, sample 1 rate 0 and size 4: changes .5 and 0, so .25 a step."""
    inputs = [torch.full((2, 3), float(value)) for value in (1, 2, 3, 4, 5)]
    outputs = [torch.tensor([[v] * 3, [4.0] * 3]) for v in (2.0, 4.0, 4.0, 4.0, 4.0)]
    assert run(EasyCacheRule(0.6, warmup=0), inputs, outputs) == "##..#"


def test_a_second_call_with_the_same_latent_keeps_the_rate():
    inputs, outputs = constant(1, 2, 2, 3, 4), constant(2, 4, 6, 5, 5)
    assert run(EasyCacheRule(1.2, warmup=0), inputs, outputs, forced=(0, 2)) == "###.."  # 2 * 1 / 6 a step


def test_threshold_zero_changes_no_bit_and_more_skips_more(pipe):
    dense, computed = generate(pipe, steps=10), []
    for threshold in (0.0, 0.2, 0.6, 100.0):
        technique = EasyCache(threshold, "reuse")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = generate(technique.apply(pipe), steps=10)
        computed.append(step_cache_report(pipe).computed["cond"])
        technique.remove(pipe)
        assert torch.equal(images, dense) == (computed[-1] == 10)
    assert computed == sorted(computed, reverse=True)
    assert (computed[0], computed[-1]) == (10, 4)  # three of warm-up and the last
    assert len(set(computed)) > 2


def test_settings_round_trip_and_bad_ones_are_refused():
    technique = EasyCache(0.1, "reuse", warmup=5)
    assert EasyCache(**json.loads(json.dumps(asdict(technique)))) == technique
    assert technique.describe() == "EasyCache at 0.1 with reuse"
    with pytest.raises(ValueError, match="0 or more, got -1"):
        EasyCache(0.1, warmup=-1)
