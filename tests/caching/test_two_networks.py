"""Step caches on Wan 2.2: two transformers, one for the noisiest steps, each with a cut and a state of its own."""

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.caching import FirstBlockCache, FixedSchedule, GuidanceCache, TeaCache, step_cache_report
from diffusion_opt.caching.step.stack import attached_cut

STEPS = 10  # of which the first network makes four


@pytest.fixture
def pipe():
    return tiny_pipeline("wan2.2")


def sample(pipe):
    return tiny_run("wan2.2", STEPS).generate(pipe, [0])


def patterns(pipe):
    passes = step_cache_report(pipe).passes
    return {name: "".join("#" if ran else "." for _, ran in seen) for name, seen in passes.items()}


def counted(pipe):
    """How often the last block of each network runs from now on."""
    ran = {"transformer": 0, "transformer_2": 0}
    for name in ran:
        getattr(pipe, name).blocks[-1].attn1.register_forward_hook(
            lambda *_, name=name: ran.update({name: ran[name] + 1})
        )
    return ran


def test_each_network_has_its_own_anchors_and_the_mask_is_that_of_the_whole_schedule(pipe):
    dense = sample(pipe)
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    first = int((pipe.scheduler.timesteps >= boundary).sum())
    assert first == 4
    ran = counted(pipe)
    technique = FixedSchedule((True, True, False, False, False, True, False, True, False, True))
    technique.apply(pipe)
    cached = sample(pipe)
    # The second network has nothing to go by in its first step, which is computed although the mask says otherwise.
    assert patterns(pipe) == dict.fromkeys(("cond", "uncond"), "##..##.#.#")
    assert ran == {"transformer": 2 * 2, "transformer_2": 2 * 4}
    assert not torch.equal(cached, dense)
    assert torch.equal(sample(pipe), cached)
    report = step_cache_report(pipe, count_macs=True)
    assert 0.3 < report.saved < 0.4
    technique.remove(pipe)
    assert torch.equal(sample(pipe), dense)
    assert attached_cut(pipe.transformer) is attached_cut(pipe.transformer_2) is None


@pytest.mark.parametrize("technique", [TeaCache(50.0), FirstBlockCache(500.0)], ids=lambda t: type(t).__name__)
def test_rules_that_decide_by_themselves(pipe, technique):
    dense = sample(pipe)
    technique.apply(pipe)
    cached = sample(pipe)
    assert patterns(pipe)["cond"] == "##..##...#"
    assert torch.equal(sample(pipe), cached)
    technique.remove(pipe)
    assert torch.equal(sample(pipe), dense)


def test_threshold_0_changes_no_bit(pipe):
    dense = sample(pipe)
    TeaCache(0.0).apply(pipe)
    assert torch.equal(sample(pipe), dense)


def test_all_or_nothing(pipe):
    """One network that is not free leaves the other one untouched; what needs one network says so."""
    FixedSchedule((True,) * STEPS).apply(pipe)
    attached_cut(pipe.transformer).detach(pipe.transformer)
    with pytest.raises(ValueError, match="a step cache is already on this transformer"):
        TeaCache(0.1).apply(pipe)
    assert attached_cut(pipe.transformer) is None
    with pytest.raises(ValueError, match="no step cache on this pipeline to remove"):
        TeaCache(0.1).remove(pipe)
    with pytest.raises(ValueError, match="two transformers"):
        GuidanceCache(2).apply(pipe)
