"""A fixed schedule in two whole graphs: the same numbers as the step cache, no graph break, no recompilation."""

import dataclasses
import json

import pytest
import torch
from small_transformers import FAMILIES, family_pass, family_pipeline, family_sample, small_transformer
from torch._dynamo.utils import counters

from diffusion_opt.caching.guidance_cache import GuidanceCache, guidance_cache_report
from diffusion_opt.caching.schedules.compiled import CompiledSchedule, compiled_schedule_report
from diffusion_opt.caching.step.pass_functions import FullPass, SkippedPass
from diffusion_opt.caching.step.predictors import PREDICTORS
from diffusion_opt.caching.step.report import step_cache_report
from diffusion_opt.caching.step.stack import StackCut
from diffusion_opt.caching.step.step_cache import Rule, StepCache
from diffusion_opt.models.block_stack import block_stack

MASK = (True, True, False, True, False, True)


class Mask(Rule):
    def start(self):
        self.index = 0

    def skip(self, stack, forced):
        self.index += 1
        return not forced and not MASK[self.index - 1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_two_functions_are_the_pass_and_its_shortcut(family):
    """With the residual of the same pass the shortcut gives the whole pass, and calls no block."""
    transformer = small_transformer(family)
    stack, call = block_stack(transformer), family_pass(family, 0.7)
    full, skip = FullPass(transformer, stack), SkippedPass(transformer, stack)
    expected = transformer(**call)
    output, residual = full(call)
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
    ran = []
    for block in stack.blocks:
        block.register_forward_pre_hook(lambda *_: ran.append(1))
    for found, wanted in zip(skip(call, residual), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    doubled = skip(call, {name: 2 * stream for name, stream in residual.items()})
    assert not torch.allclose(doubled[0], expected[0], atol=1e-3)
    assert not ran
    weights = {id(p) for p in transformer.parameters()}
    assert {id(p) for module in (full, skip) for p in module.parameters()} == weights  # shared, none copied
    assert torch.equal(transformer(**call)[0], expected[0])


@pytest.mark.compiled
@pytest.mark.parametrize("family", FAMILIES)
def test_two_whole_graphs_give_what_the_step_cache_gives(family):
    pipe = family_pipeline(family)
    dense = family_sample(pipe)
    cut = StackCut(pipe.transformer, StepCache(Mask(), PREDICTORS["forecast"]), pipe)
    cut.attach(pipe.transformer)
    cached = family_sample(pipe)
    cut.detach(pipe.transformer)
    technique = CompiledSchedule(MASK, backend="eager")
    technique.apply(pipe)
    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(family_sample(pipe), cached, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    again = family_sample(pipe)
    assert counters["stats"]["unique_graphs"] == 2  # nor is anything compiled again
    assert torch.equal(family_sample(pipe), again)
    names = {"flux2": 2, "wan": 2}.get(family, 1)
    report = compiled_schedule_report(pipe)
    assert [tuple(ran for _, ran in passes) for passes in report.passes.values()] == [MASK] * names
    technique.remove(pipe)
    assert torch.equal(family_sample(pipe), dense)


@pytest.mark.compiled
def test_with_a_guidance_cache_guidance_passes_follow_the_prompt_s():
    """A guidance pass that ran last two steps ago is at the place in the mask where the prompt's pass is."""
    pipe = CompiledSchedule(MASK, backend="eager").apply(family_pipeline("wan", blocks=1))
    GuidanceCache(3, "reuse").apply(pipe)
    family_sample(pipe)
    spared = [ran for _, ran in guidance_cache_report(pipe).passes["uncond"]]
    assert spared == [True, False, False, True, False, True]
    times = {name: dict(passes) for name, passes in compiled_schedule_report(pipe).passes.items()}
    assert list(times["cond"].values()) == list(MASK)
    assert times["uncond"] == {time: True for time, ran in zip(times["cond"], spared, strict=True) if ran}


@pytest.mark.compiled
@pytest.mark.slow
def test_with_a_real_compiler():
    pipe = family_pipeline("wan", blocks=1)
    eager = CompiledSchedule(MASK, backend="eager")
    expected = family_sample(eager.apply(pipe))
    eager.remove(pipe)
    torch.testing.assert_close(family_sample(CompiledSchedule(MASK).apply(pipe)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.compiled
@pytest.mark.parametrize("what", ["blocks", "transformer"])
def test_a_step_cache_stays_right_when_the_model_is_compiled_later(what):
    """Decisions are kept out of the graphs; what is compiled is the rest."""
    pipe = family_pipeline("flux2", blocks=2)
    StackCut(pipe.transformer, StepCache(Mask(), PREDICTORS["forecast"]), pipe).attach(pipe.transformer)
    expected = family_sample(pipe)
    torch._dynamo.reset()
    counters.clear()
    for module in block_stack(pipe.transformer).blocks if what == "blocks" else [pipe.transformer]:
        module.compile(backend="eager")
    torch.testing.assert_close(family_sample(pipe), expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] >= 2  # the blocks are among what was compiled
    report = step_cache_report(pipe)
    assert [tuple(ran for _, ran in passes) for passes in report.passes.values()] == [MASK] * 2


@pytest.mark.compiled
def test_another_number_of_steps_is_refused_and_another_size_starts_anew():
    pipe = CompiledSchedule(MASK, "reuse", backend="eager").apply(family_pipeline("wan", blocks=1))
    with pytest.raises(ValueError, match="for 6 timesteps, the scheduler has 5"):
        family_sample(pipe, steps=5)
    alone = family_sample(pipe, batch=3)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        family_sample(pipe, batch=2, callback_on_step_end=stop)
    with pytest.warns(UserWarning, match="skipped none of 1 steps"):
        assert torch.equal(family_sample(pipe, batch=3), alone)


def test_settings_and_refusals():
    technique = CompiledSchedule(MASK, "reuse")
    stored = json.loads(json.dumps(dataclasses.asdict(technique)))
    assert CompiledSchedule(**stored) == technique
    assert technique.describe() == "compiled schedule 4/6 with reuse"
    with pytest.raises(ValueError, match="skips nothing"):
        CompiledSchedule((True,) * 5)
    for mask, seen in (((False, True), r"got \.#"), ((), "got an empty mask")):
        with pytest.raises(ValueError, match=f"must begin with a computed step, {seen}"):
            CompiledSchedule(mask)
    pipe = family_pipeline("sd3")
    with pytest.raises(ValueError, match="no compiled schedule on this pipeline to remove"):
        technique.remove(pipe)
    technique.apply(pipe)
    with pytest.raises(ValueError, match="already on this transformer"):
        technique.apply(pipe)
    with pytest.raises(ValueError, match="a compiled schedule is already on this transformer"):
        StackCut(pipe.transformer, StepCache(Mask(), PREDICTORS["reuse"]))
    technique.remove(pipe)
    GuidanceCache().apply(pipe)
    with pytest.raises(ValueError, match="go past the hook 'diffusion_opt_guidance_cache'"):
        technique.apply(pipe)
    GuidanceCache().remove(pipe)
    StackCut(pipe.transformer, StepCache(Mask(), PREDICTORS["reuse"])).attach(pipe.transformer)
    with pytest.raises(ValueError, match="a step cache is already on this transformer"):
        technique.apply(pipe)
