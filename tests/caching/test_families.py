"""The step cache on all five families: in diffusers' pipelines and in custom loops, with one and with two passes."""

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from small_transformers import FAMILIES, family_pass, family_pipeline, family_sample, small_transformer

from diffusion_opt.caching.step.hooks import cache_context
from diffusion_opt.caching.step.predictors import PREDICTORS
from diffusion_opt.caching.step.report import step_cache_report
from diffusion_opt.caching.step.stack import StackCut
from diffusion_opt.caching.step.step_cache import Rule, StepCache
from diffusion_opt.models import block_stack

NAMES = {"flux2": ("cond", "uncond"), "wan": ("cond", "uncond"), "ltx": ("cond_uncond",), "ltx2": ("cond_uncond",)}


class Mask(Rule):
    """Computes where the mask, one letter a pass, says #."""

    def __init__(self, mask: str) -> None:
        self.mask, self.index = mask, 0

    @property
    def active(self):
        return "." in self.mask

    def start(self):
        self.index = 0

    def skip(self, stack, forced):
        self.index += 1
        return not forced and self.mask[self.index - 1] == "."


def put(transformer, rule: Rule, predictor: str = "forecast", pipe=None) -> StepCache:
    cache = StepCache(rule, PREDICTORS[predictor])
    StackCut(transformer, cache, pipe).attach(transformer)
    return cache


def drop(transformer) -> None:
    transformer._diffusers_hook.get_hook("diffusion_opt_step_cache").cut.detach(transformer)


def traces(transformer) -> list[str]:
    """Modules with a hook registry (diffusers' `cache_context` leaves an empty one itself) or a wrapped forward."""
    return [name for name, m in transformer.named_modules() if {"_diffusers_hook", "forward"} & set(vars(m))]


def patterns(report) -> dict[str, str]:
    return {name: "".join("#" if ran else "." for _, ran in passes) for name, passes in report.passes.items()}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_its_pipeline(family, guidance):
    """Skip-none and removal change no bit; skipping does; and a second generation with the same seed is the same."""
    pipe = family_pipeline(family)
    dense = family_sample(pipe, guidance=guidance)
    before = traces(pipe.transformer)
    put(pipe.transformer, Mask("######"), pipe=pipe)
    assert torch.equal(family_sample(pipe, guidance=guidance), dense)
    drop(pipe.transformer)
    put(pipe.transformer, Mask("##.#.."), pipe=pipe)
    cached = family_sample(pipe, guidance=guidance)
    names = NAMES.get(family, ("default",))
    names = names[:1] if guidance == 1 else names
    assert patterns(step_cache_report(pipe)) == dict.fromkeys(names, "##.#.#")
    assert 0 < float((cached - dense).norm() / dense.norm()) < 0.2
    assert torch.equal(family_sample(pipe, guidance=guidance), cached)
    drop(pipe.transformer)
    assert torch.equal(family_sample(pipe, guidance=guidance), dense)
    assert traces(pipe.transformer) == before


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_skipped_pass_is_the_stack_input_plus_the_forecast(family):
    """Against the tail run on what the formula gives, with every stream that the tail reads."""
    transformer = small_transformer(family)
    tails = {"ltx2": {"video": "norm_out", "audio": "audio_norm_out"}}.get(family, {"hidden": "norm_out"})
    ends, starts = {}, {}
    for name, tail in tails.items():
        transformer.get_submodule(tail).register_forward_pre_hook(lambda m, a, n=name: ends.update({n: a[0]}))

    class Eager(Rule):
        def skip(self, stack, forced):
            starts.update(stack.streams)
            return not forced

    cache = put(transformer, Eager())
    seen = []
    for seed, time in enumerate((0.9, 0.7, 0.4)):
        transformer(**family_pass(family, time, seed=seed))
        seen.append({name: ends[name] - starts[name] for name in tails})
    assert patterns(cache.report()) == {"default": "##."}
    for name, residual in seen[2].items():
        line = seen[1][name] + (seen[1][name] - seen[0][name]) * (0.4 - 0.7) / (0.7 - 0.9)
        torch.testing.assert_close(residual, line.to(residual.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_custom_loop_with_two_passes_named_or_not(family):
    """Where nobody names the passes they are told apart by the order of the calls; the result is the same."""
    results = []
    for named in (True, False):
        transformer = small_transformer(family)
        cache = put(transformer, Mask("##.#."))
        x = family_pass(family, 1.0)["hidden_states"]
        for i in range(5):
            given = family_pass(family, 1 - i / 5) | {"hidden_states": x}
            other = given | {"encoder_hidden_states": -given["encoder_hidden_states"]}
            if named:
                with cache_context(transformer, "cond", step_index=i, num_inference_steps=5):
                    v = transformer(**given)[0]
                with cache_context(transformer, "uncond", step_index=i, num_inference_steps=5):
                    u = transformer(**other)[0]
            else:
                v, u = transformer(**given)[0], transformer(**other)[0]
            x = x - 0.2 * (u + 2 * (v - u))
        results.append(x)
        names = ("cond", "uncond") if named else ("default", "pass 2")
        # Without a pipeline the last step is known from the context alone.
        assert patterns(cache.report()) == dict.fromkeys(names, "##.##" if named else "##.#.")
    assert results[0].isfinite().all()
    assert not torch.equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_first_blocks_as_a_probe(family):
    """`probe_blocks` run always, here three (of FLUX.2 two double and a single); the last only if the rule says so."""

    class Probing(Rule):
        probe_blocks = 3

        def __init__(self):
            self.probes = []

        def skip(self, stack, forced):
            self.probes.append(stack.probe)
            return not forced

    transformer, ran = small_transformer(family), []
    cache = put(transformer, Probing(), "reuse")
    for index, block in enumerate(block_stack(transformer).blocks):
        attention = block.attn if hasattr(block, "attn") else block.attn1
        attention.register_forward_hook(lambda *_, index=index: ran.append(index))
    start = []
    for seed, time in enumerate((0.9, 0.8)):
        transformer(**family_pass(family, time, seed=seed))
        start.append(cache.rule.probes[-1])
    assert ran == [0, 1, 2, 3, 0, 1, 2]
    assert patterns(cache.report()) == {"default": "#."}
    assert all(not torch.equal(start[0][name], start[1][name]) for name in start[0])
    with pytest.raises(ValueError, match="of 4 blocks, 4 cannot be probed"):
        Probing.probe_blocks = 4
        put(small_transformer(family), Probing())


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_a_scheduler_that_calls_twice_a_step(family):
    """Heun's last time comes twice; the scheduler knows its place, so only the very last call is forced."""
    pipe = family_pipeline(family)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=1.0)
    put(pipe.transformer, Mask("####..##..#"), pipe=pipe)
    assert family_sample(pipe, steps=6).isfinite().all()
    assert set(patterns(step_cache_report(pipe)).values()) == {"####..##..#"}


def test_every_guidance_of_ltx2():
    """Three passes per step of different batch, by name: one decision, anchors of each."""
    pipe = family_pipeline("ltx2")
    put(pipe.transformer, Mask("##.#.."), pipe=pipe)
    family_sample(pipe, stg_scale=1.0, modality_scale=3.0, spatio_temporal_guidance_blocks=[2])
    names = ("cond_uncond", "uncond_stg", "uncond_modality")
    assert patterns(step_cache_report(pipe)) == dict.fromkeys(names, "##.#.#")


@torch.no_grad()
def test_passes_of_sd3_that_leave_blocks_out_are_left_alone():
    """Skip-layer guidance: an extra pass without some blocks, which is neither skipped nor remembered."""
    transformer = small_transformer("sd3")
    given = family_pass("sd3", 0.8)
    expected = transformer(**given, skip_layers=[1])[0]
    cache = put(transformer, Mask("#" * 9))
    for time in (0.9, 0.8):
        transformer(**family_pass("sd3", time))
    assert torch.equal(transformer(**given, skip_layers=[1])[0], expected)
    assert patterns(cache.report()) == {"default": "##"}


@torch.no_grad()
def test_sd3_with_a_controlnet():
    """What is added between the blocks is part of the residual, and is not added again to a skipped pass."""
    transformer = small_transformer("sd3")
    ends = []
    transformer.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    control = [torch.randn(2, 6, 32)]
    put(transformer, Mask("#."), "reuse")
    for seed in (0, 1):
        transformer(**family_pass("sd3", 0.9 - 0.1 * seed, seed=0), block_controlnet_hidden_states=control)
    torch.testing.assert_close(ends[1], ends[0])
