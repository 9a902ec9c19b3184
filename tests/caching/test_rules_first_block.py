"""First-block cache: looks back to the last computed step, and is that of diffusers where diffusers' runs."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from caching.passes import decisions, stack_pass
from caching.pipelines import generate
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from small_transformers import family_pipeline, family_sample

from diffusion_opt.caching import FirstBlockCache, step_cache_report
from diffusion_opt.caching.rules import FirstBlockRule


def test_compared_with_the_last_computed_pass_and_not_with_the_one_before():
    """Residuals 1.0, 1.1, 1.2, …: each differs little from the one before, and more and more from the computed."""
    passes = [stack_pass(probe=torch.full((1, 5, 3), 1 + index / 10)) for index in range(8)]
    # against 1.0: .1 .2 (.3 computes, at 1.3), against 1.3: .077 .154 .231, against 1.7 nothing is left
    assert decisions(FirstBlockRule(0.24), passes) == "#..#...#"
    assert decisions(FirstBlockRule(0.24), passes, forced=(0, 2)) == "#.#..#.."  # against 1.2: .083 .167 (.25)
    assert decisions(FirstBlockRule(0.0), passes) == "########"
    assert decisions(FirstBlockRule(0.0), [passes[0]] * 4) == "####"  # not even where nothing changed


def test_the_mean_over_samples_decides_and_a_generation_starts_afresh():
    rule = FirstBlockRule(0.2)
    before, after = torch.ones(2, 5, 3), torch.ones(2, 5, 3)
    after[0] += 0.3  # changes 0.3 and 0: mean 0.15
    assert decisions(rule, [stack_pass(probe=before), stack_pass(probe=after)]) == "#."
    rule.start()
    assert decisions(rule, [stack_pass(probe=after)], forced=()) == "#"


def test_threshold_zero_and_removal_change_no_bit(pipe):
    dense = generate(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(FirstBlockCache(0.0).apply(pipe)), dense)
    FirstBlockCache(0.0).remove(pipe)
    assert not torch.equal(generate(FirstBlockCache(9.0).apply(pipe)), dense)
    assert step_cache_report(pipe).skipped == {"cond": 3, "uncond": 3}
    FirstBlockCache(9.0).remove(pipe)
    assert torch.equal(generate(pipe), dense)


def outputs(pipe: DiffusionPipeline, steps: int) -> tuple[list[torch.Tensor], list[bool]]:
    """The transformer's output at each pass of one generation without guidance, and whether the second block ran."""
    found, ran = [], []
    handles = [
        pipe.transformer.register_forward_hook(lambda module, args, out: found.append(out[0])),
        pipe.transformer.register_forward_pre_hook(lambda module, args: ran.append(False)),
        pipe.transformer.blocks[1].attn1.register_forward_pre_hook(lambda module, args: ran.__setitem__(-1, True)),
    ]
    family_sample(pipe, steps=steps, guidance=1.0, batch=1)
    for handle in handles:
        handle.remove()
    return found, ran


@pytest.mark.parametrize("threshold", [0.12, 0.16])
def test_on_wan_it_is_the_first_block_cache_of_diffusers(threshold):
    steps, pipe = 12, family_pipeline("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    theirs, ran_there = outputs(pipe, steps)
    pipe.transformer.disable_cache()
    FirstBlockCache(threshold, "reuse").apply(pipe)
    ours, ran_here = outputs(pipe, steps)
    assert ran_here[:-1] == ran_there[:-1]  # the last step is always computed here
    assert 2 < sum(ran_here) < steps - 2
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_settings_round_trip_and_bad_ones_are_refused():
    technique = FirstBlockCache(0.1, "reuse")
    assert FirstBlockCache(**json.loads(json.dumps(asdict(technique)))) == technique
    assert technique.describe() == "first-block cache at 0.1 with reuse"
    with pytest.raises(ValueError, match="threshold must be 0"):
        FirstBlockCache(-1.0)
