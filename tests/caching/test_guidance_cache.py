"""The guidance cache: which passes it spares, what stands in for them, and that it goes with a step cache."""

import copy
import dataclasses
import json

import pytest
import torch
from caching.pipelines import generate, small_pipeline
from diffusers import Flux2KleinPipeline
from diffusers.hooks import HookRegistry
from small_transformers import family_pass, family_pipeline, family_sample, small_transformer

from diffusion_opt.caching.guidance_cache import GuidanceCache, guidance_cache_report
from diffusion_opt.caching.region import StreamingRegionCache
from diffusion_opt.caching.step.predictors import PREDICTORS
from diffusion_opt.caching.step.report import step_cache_report
from diffusion_opt.caching.step.stack import StackCut
from diffusion_opt.caching.step.step_cache import Rule, StepCache
from diffusion_opt.evaluation import count
from diffusion_opt.flow import ALL_TIMES, SAMPLERS, ClassCondition, Guided, randn
from diffusion_opt.models import velocity_model


class Mask(Rule):
    """Computes where the mask, one letter a step, says #."""

    def __init__(self, mask: str) -> None:
        self.mask, self.index = mask, 0

    def start(self):
        self.index = 0

    def skip(self, stack, forced):
        self.index += 1
        return not forced and self.mask[self.index - 1] == "."


def put_step_cache(pipe, mask: str) -> StackCut:
    cut = StackCut(pipe.transformer, StepCache(Mask(mask), PREDICTORS["forecast"]), pipe)
    cut.attach(pipe.transformer)
    return cut


def pattern(report, name: str = "uncond") -> str:
    return "".join("#" if ran else "." for _, ran in report.passes[name])


@pytest.mark.parametrize(
    ("every", "predictor", "expected"),
    [(1, "forecast", "########"), (2, "forecast", "###.#.##"), (2, "reuse", "#.#.#.##"), (3, "reuse", "#..#..##")],
)
def test_every_other_guidance_pass_is_spared(pipe, every, predictor, expected):
    ran = []
    pipe.transformer.norm_out.register_forward_hook(lambda *_: ran.append(1))
    GuidanceCache(every, predictor).apply(pipe)
    generate(pipe, steps=8)
    report = guidance_cache_report(pipe)
    assert pattern(report) == expected
    assert pattern(report, "cond") == "########"
    assert len(ran) == report.total_computed == 8 + expected.count("#")


def test_thirty_steps_cost_forty_seven_passes(pipe):
    GuidanceCache(2).apply(pipe)
    generate(pipe, steps=30, batch=1)
    assert guidance_cache_report(pipe).total_computed == 47


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [False, True])
def test_a_spared_pass_is_the_first_minus_the_forecast_difference(return_dict):
    """On LTX-2, so for two outputs; against the formula."""
    pipe = family_pipeline("ltx2")
    transformer, dense = pipe.transformer, small_transformer("ltx2")
    GuidanceCache(9).apply(pipe)
    outputs = []
    for i, time in enumerate((0.9, 0.7, 0.4)):
        given = family_pass("ltx2", time, seed=i) | {"return_dict": return_dict}
        other = given | {"encoder_hidden_states": -given["encoder_hidden_states"]}
        with transformer.cache_context("cond"):
            transformer(**given)
        with transformer.cache_context("uncond"):
            outputs.append(transformer(**other))
        given["return_dict"] = other["return_dict"] = False
        first, exact = dense(**given), dense(**other)
        if i < 2:
            assert torch.equal(outputs[i][0], exact[0])
        outputs[i] = (outputs[i], [a - b for a, b in zip(first, exact, strict=True)], first)
    (_, d0, _), (_, d1, _), (spared, _, first) = outputs
    assert isinstance(spared, tuple) is not return_dict
    for found, a, b, v in zip((spared[0], spared[1]), d0, d1, first, strict=True):
        line = b + (b - a) * (0.4 - 0.7) / (0.7 - 0.9)
        torch.testing.assert_close(found, v - line, rtol=1e-4, atol=1e-5)


def test_every_one_and_removal_change_no_bit(pipe):
    dense, before = generate(pipe), sorted(vars(pipe.transformer))
    technique = GuidanceCache(1)
    assert technique.apply(pipe) is pipe
    assert torch.equal(generate(pipe), dense)
    technique.remove(pipe)
    GuidanceCache(3).apply(pipe)
    spared = generate(pipe)
    assert not torch.equal(spared, dense)
    generate(pipe, seed=99, steps=5)
    assert torch.equal(generate(pipe), spared)  # nothing is left over from other generations
    GuidanceCache(3).remove(pipe)
    assert torch.equal(generate(pipe), dense)
    assert sorted(vars(pipe.transformer)) == before


@torch.no_grad()
def test_outside_the_interval_there_is_no_guidance(pipe):
    """As if the sampler were given a model that is guided in the interval only (`flow.Guided`)."""
    interval, labels, noise = (0.35, 0.8), torch.tensor([1, 2]), randn((2, 1, 16, 16), torch.Generator().manual_seed(0))
    latents = Flux2KleinPipeline._patchify_latents(pipe.vae.encode(noise).latents)
    GuidanceCache(1, interval=interval).apply(pipe)
    made = pipe(labels.tolist(), 8, 2.5, latents=latents, output_type="latent").images
    times = [time for time, _ in guidance_cache_report(pipe).passes["cond"]]
    assert pattern(guidance_cache_report(pipe)) == "..####.."
    GuidanceCache(1).remove(pipe)
    condition = ClassCondition(labels, pipe.class_embedder.num_classes)
    for limits in (interval, ALL_TIMES):
        guided = Guided(velocity_model(pipe), 2.5, limits)
        wanted = SAMPLERS["euler"](guided, noise, torch.tensor([*times, 0.0]), condition)
        assert torch.allclose(pipe.vae.decode(made).sample, wanted, atol=1e-3) == (limits == interval)


def test_forecasts_begin_anew_inside_the_interval(pipe):
    GuidanceCache(2, "reuse", (0.3, 0.9)).apply(pipe)
    generate(pipe, steps=16)
    marks = pattern(guidance_cache_report(pipe))
    times = [time for time, _ in guidance_cache_report(pipe).passes["uncond"]]
    assert all(mark == "." for mark, t in zip(marks, times, strict=True) if not 0.3 <= t <= 0.9)
    inside = "".join(mark for mark, t in zip(marks, times, strict=True) if 0.3 <= t <= 0.9)
    assert inside.startswith("#") and ".#.#." in inside and "##" not in inside[1:]


def test_a_pass_that_is_left_out_is_not_counted(pipe):
    GuidanceCache(1, interval=(0.35, 0.8)).apply(pipe)
    cost = count(lambda: generate(pipe, steps=8), pipe.transformer)
    GuidanceCache(1).remove(pipe)
    full = count(lambda: generate(pipe, steps=8), pipe.transformer)
    assert (cost.nfe, full.nfe) == (12, 16) and cost.macs * 16 == full.macs * 12


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [False, True])
def test_a_pass_without_effect_is_the_prompts_half_of_the_first(return_dict):
    """On LTX-2: the first pass of a step may hold two halves, and has two outputs."""
    transformer = (pipe := family_pipeline("ltx2")).transformer
    GuidanceCache(1, interval=(0.1, 0.5)).apply(pipe)
    given = family_pass("ltx2", 0.9) | {"return_dict": return_dict}
    half = {key: x[1:] if isinstance(x, torch.Tensor) and x.ndim and len(x) == 2 else x for key, x in given.items()}
    with transformer.cache_context("cond_uncond"):
        first = transformer(**given)
    with transformer.cache_context("uncond_modality"):
        spared = transformer(**half)
    assert type(spared) is type(first)
    for mine, whole in zip(*(o if isinstance(o, tuple) else o.to_tuple() for o in (spared, first)), strict=True):
        assert len(whole) == 2 and torch.equal(mine, whole[1:])


@pytest.mark.parametrize("guidance_first", [True, False])
def test_with_a_step_cache(guidance_first):
    """Guidance passes run only where the step cache ran the first one; which was put on first makes no difference."""
    pipe = small_pipeline()
    technique = GuidanceCache(2)
    if guidance_first:
        technique.apply(pipe)
    cut = put_step_cache(pipe, "##.#.#.#.#")
    if not guidance_first:
        technique.apply(pipe)
    images = generate(pipe, steps=10)
    assert pattern(step_cache_report(pipe), "cond") == "##.#.#.#.#"
    assert pattern(guidance_cache_report(pipe)) == "##.#...#.#"
    assert pattern(step_cache_report(pipe)) == "#####"  # the step cache meets only those that ran, all computed
    cut.detach(pipe.transformer)
    technique.remove(pipe)
    other = small_pipeline()
    put_step_cache(other, "##.#.#.#.#")
    assert not torch.equal(generate(other, steps=10), images)
    torch.testing.assert_close(generate(other, steps=10), images, atol=0.2, rtol=0)


def test_further_guidances_of_ltx2_are_spared_too():
    """The first pass holds two halves, the prompt's last; the others are one half each."""
    pipe = family_pipeline("ltx2")
    GuidanceCache(2).apply(pipe)
    call = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [2]}
    assert family_sample(pipe, steps=8, **call).isfinite().all()
    report = guidance_cache_report(pipe)
    assert {pattern(report, name) for name in ("uncond_stg", "uncond_modality")} == {"###.#.##"}


def test_what_cannot_save_anything_warns(pipe):
    GuidanceCache().apply(pipe)
    with pytest.warns(UserWarning, match="left out no pass: each step was a single pass"):
        generate(pipe, guidance=1.0)
    with pytest.warns(UserWarning, match="left out no pass: 3 steps are too few"):
        generate(pipe, steps=3)
    GuidanceCache(1).remove(pipe)
    GuidanceCache(1, interval=(0.0, 0.999)).apply(pipe)
    with pytest.warns(UserWarning, match=r"each step was a single pass"):
        generate(pipe, guidance=1.0)
    GuidanceCache(1).remove(pipe)
    GuidanceCache(1, interval=(0.01, 1)).apply(pipe)
    with pytest.warns(UserWarning, match=r"no step lies outside t = 0\.01 to 1"):
        generate(pipe)
    batched = family_pipeline("ltx")
    put_step_cache(batched, "#" * 6)
    GuidanceCache().apply(batched)
    with pytest.warns(UserWarning, match="a step cache is on the transformer, and it keeps whole batches"):
        family_sample(batched)


def test_training_is_left_alone(pipe):
    GuidanceCache(2).apply(pipe)
    given = family_pass("flux2", 0.7)
    transformer = small_transformer("flux2").train()
    pipe.transformer = transformer
    GuidanceCache(2).apply(pipe)
    transformer(**given)[0].sum().backward()
    assert guidance_cache_report(pipe).passes == {}


def test_settings_and_refusals(pipe):
    technique = GuidanceCache(3, "reuse")
    assert GuidanceCache(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
    assert technique.describe() == "guidance at every 3. step with reuse"
    limited = GuidanceCache(1, interval=[0.3, 0.9])
    assert GuidanceCache(**json.loads(json.dumps(dataclasses.asdict(limited)))) == limited
    assert limited.describe() == "guidance from t = 0.3 to 0.9"
    with pytest.raises(ValueError, match=r"interval must rise and lie in \[0, 1\], got \(0.9, 0.3\)"):
        GuidanceCache(interval=(0.9, 0.3))
    with pytest.raises(ValueError, match="got 0"):
        GuidanceCache(0)
    with pytest.raises(ValueError, match="no guidance cache on this pipeline to remove"):
        technique.remove(pipe)
    with pytest.raises(ValueError, match="no guidance cache on this pipeline: apply"):
        guidance_cache_report(pipe)
    technique.apply(pipe)
    with pytest.raises(ValueError, match="already on this transformer"):
        technique.apply(pipe)
    with pytest.raises(ValueError, match="cannot be deep-copied"):
        copy.deepcopy(pipe.transformer)
    assert HookRegistry.check_if_exists_or_initialize(pipe.transformer).hooks
    wan = family_pipeline("wan")
    wan.register_modules(transformer_2=small_transformer("wan"))
    with pytest.raises(ValueError, match="two transformers"):
        technique.apply(wan)


def test_a_region_cache_on_the_transformer_is_refused(pipe):
    StreamingRegionCache().apply(pipe)
    with pytest.raises(ValueError, match="a region cache is on this transformer"):
        GuidanceCache().apply(pipe)


def test_on_the_shipped_model_forecasting_the_difference_beats_reusing_it(shipped):
    pipe = shipped("fashion-micro")
    dense = generate(pipe, steps=16, batch=2)
    errors = {}
    for predictor in ("reuse", "forecast"):
        technique = GuidanceCache(3, predictor)
        errors[predictor] = float((generate(technique.apply(pipe), steps=16, batch=2) - dense).norm() / dense.norm())
        technique.remove(pipe)
    assert 0 < errors["forecast"] < errors["reuse"] < 0.2
