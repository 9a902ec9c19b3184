"""Caches follow the schedule that runs: strengths, second pipelines, guidance switched off, other networks, orders."""

import contextlib
import gc

import pytest
import torch
from caching.pipelines import generate, run_of, small_pipeline
from peft import LoraConfig
from small_transformers import family_pipeline, family_sample
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.caching import (
    CompiledSchedule,
    FixedInterval,
    FixedSchedule,
    GuidanceCache,
    MagCache,
    TeaCache,
    calibrate_step_cache,
    compiled_schedule_report,
    guidance_cache_report,
    step_cache_report,
)
from diffusion_opt.caching.schedules.schedule import search_schedules
from diffusion_opt.caching.schedules.search import SearchSettings
from diffusion_opt.models import TinyFlux2Pipeline

MASK = (True, True, False, False, False, True, True, True)


def pattern(report, name: str | None = None) -> str:
    passes = report.passes[name] if name else next(iter(report.passes.values()))
    return "".join("#" if ran else "." for _, ran in passes)


@pytest.mark.parametrize("kind", ["sd3-img2img", "flux2-klein-inpaint"])
def test_image_to_image_follows_the_entries_from_where_it_begins(kind):
    """Strength .8 of 8 steps begins at step 1 or 2; the first step of a run is computed whatever the mask says."""
    pipe, run = tiny_pipeline(kind), tiny_run(kind, num_inference_steps=8)
    FixedSchedule(MASK).apply(pipe)
    run.generate(pipe, [0])
    begin = pipe.scheduler.begin_index
    expected = "#" + "".join("#" if ran else "." for ran in MASK)[begin + 1 :]
    assert begin > 0 and pattern(step_cache_report(pipe)) == expected


@pytest.mark.compiled
def test_a_compiled_schedule_does_so_too():
    pipe, run = tiny_pipeline("sd3-img2img"), tiny_run("sd3-img2img", num_inference_steps=8)
    CompiledSchedule(MASK, backend="eager").apply(pipe)
    run.generate(pipe, [0])
    assert pattern(compiled_schedule_report(pipe)) == "#...###"[-len(MASK) + pipe.scheduler.begin_index :]


def test_a_calibration_of_image_to_image_is_finite_and_serves_its_strength_alone(tmp_path):
    pipe, run = tiny_pipeline("sd3-img2img"), tiny_run("sd3-img2img", num_inference_steps=8)
    with contextlib.suppress(UserWarning):
        found = calibrate_step_cache(pipe, run)
    assert found.run.begin == 1 and len(found.step_table) == 6 and len(found.magnitude_ratios) == 7
    found.save(tmp_path / "i2i.json")
    MagCache(0.5, str(tmp_path / "i2i.json"), retention=0.0).apply(pipe)
    run.generate(pipe, [0])
    whole = tiny_run("sd3-img2img", num_inference_steps=8)
    whole.arguments["strength"] = 1.0
    with pytest.raises(ValueError, match="begin at step 1, this one begins at step 0 of 8"):
        whole.generate(pipe, [0])


def test_a_search_of_image_to_image_chooses_among_the_steps_that_run(tmp_path):
    pipe, run = tiny_pipeline("sd3-img2img"), tiny_run("sd3-img2img", num_inference_steps=6)
    found = search_schedules(pipe, run, (3,), SearchSettings(trials=1, amplify_every=0, max_gap=4), num_held_out=1)[3]
    assert found.num_computed == 3 and found.run.begin > 0 and all(found.mask[: found.run.begin + 1])


def test_passes_of_further_kinds_are_searched_and_calibrated():
    """LTX-2 as it is called by default: three passes per step, of which the first holds two halves."""
    pipe, run = tiny_pipeline("ltx2"), tiny_run("ltx2", num_inference_steps=4)
    found = search_schedules(pipe, run, (2,), SearchSettings(trials=0, amplify_every=0, max_gap=3), num_held_out=0)[2]
    assert found.num_computed == 2
    calibration = calibrate_step_cache(pipe, run)
    assert {name for name, _ in calibration.further} == {"uncond_stg", "uncond_modality"}
    assert all(0.1 < share < 10 for _, share in calibration.further)


def test_guidance_nowhere_is_no_guidance_where_it_is_batched_too():
    for kind, off in (("ltx2", {"audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0,
                                "modality_scale": 1.0, "audio_modality_scale": 1.0}), ("sd3", {})):  # fmt: skip
        pipe, run = tiny_pipeline(kind), tiny_run(kind, num_inference_steps=4)
        expected = run.generate(pipe, [0], guidance_scale=1.0, **off)
        GuidanceCache(1, interval=(0.0, 1e-4)).apply(pipe)
        torch.testing.assert_close(run.generate(pipe, [0], guidance_scale=4.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd3", "ltx"])
def test_doubled_batches_are_halved_at_every_other_step(kind):
    pipe, run = tiny_pipeline(kind), tiny_run(kind, num_inference_steps=8)
    dense, samples = run.generate(pipe, [0]), []
    GuidanceCache(2).apply(pipe)
    block = next(iter(pipe.transformer.transformer_blocks))
    block.register_forward_pre_hook(
        lambda m, args, kwargs: samples.append(len(kwargs.get("hidden_states", args[0] if args else None))),
        with_kwargs=True,
    )
    cached = run.generate(pipe, [0])
    assert pattern(guidance_cache_report(pipe), "uncond") == "###.#.##"
    assert [size // min(samples) for size in samples] == [2, 2, 2, 1, 2, 1, 2, 2]
    assert 0 < float((cached - dense).norm() / dense.norm()) < 0.2
    GuidanceCache(2).remove(pipe)
    assert torch.equal(run.generate(pipe, [0]), dense)


@pytest.mark.parametrize("kind", ["sd3", "flux2-klein"])
def test_guidance_that_is_switched_off_midway_loses_no_place(kind):
    """Batched guidance leaves half of the samples: nothing kept can be used, but the mask goes on where it was."""

    def off(pipe, step, time, kept):
        if step == 2:
            pipe._guidance_scale = 1.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                if name in kept and kind == "sd3":
                    kept[name] = kept[name].chunk(2)[1]
        return kept

    pipe, run = tiny_pipeline(kind), tiny_run(kind, num_inference_steps=8)
    asked = ["latents", "prompt_embeds", *(["pooled_prompt_embeds"] if kind == "sd3" else [])]
    call = run.call([0], output_type="latent", callback_on_step_end=off, callback_on_step_end_tensor_inputs=asked)
    FixedSchedule((True, True, False, False, True, False, False, True)).apply(pipe)
    assert pipe(**call).images.isfinite().all()
    assert pattern(step_cache_report(pipe)) == ("##.##..#" if kind == "sd3" else "##..#..#")


def test_a_second_pipeline_is_asked_for_itself(tmp_path):
    """It outlives the one that the cache was applied to, and has a scheduler and a last call of its own."""
    first = small_pipeline()
    calibrate_step_cache(first, run_of("0", "1")).save(tmp_path / "c.json")
    TeaCache(9.0, curve=str(tmp_path / "c.json")).apply(first)
    generate(first)
    second = TinyFlux2Pipeline(**first.components)
    second.scheduler = type(first.scheduler).from_config(first.scheduler.config)
    second.set_progress_bar_config(disable=True)
    for _ in range(2):
        generate(second)
        assert pattern(step_cache_report(second)) == "##...#"
        with pytest.raises(ValueError, match="this run has guidance 7"):
            generate(second, guidance=7.0)
        if first is not None:
            generate(first)  # its last call says nothing of the other's
        first = None
        gc.collect()


def lora(pipe) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))


def test_a_calibration_knows_adapters_and_forgives_the_precision(tmp_path):
    pipe = small_pipeline()
    calibrate_step_cache(pipe, run_of("0", "1")).save(tmp_path / "bare.json")
    technique = TeaCache(9.0, curve=str(tmp_path / "bare.json"))
    technique.apply(pipe)
    generate(pipe)
    lora(pipe)  # after the cache: seen when the next generation begins
    with pytest.raises(ValueError, match=r"this one is .* with LoRA default"):
        generate(pipe)
    pipe.transformer.disable_adapters()
    generate(pipe)
    technique.remove(pipe)
    pipe.transformer.enable_adapters()
    with pytest.raises(ValueError, match="with LoRA default"):
        technique.apply(pipe)
    technique.apply(small_pipeline().to(torch.bfloat16))


@pytest.mark.compiled
def test_a_compiled_schedule_sees_what_came_after_it():
    """An adapter and a replaced layer: the compiled passes are of the network that is there."""
    mask = (True, True, False, True, False, True)

    def made(order: str) -> torch.Tensor:
        pipe = small_pipeline(num_double=1, num_single=1)
        for act in order:
            if act == "c":
                CompiledSchedule(mask, backend="eager").apply(pipe)
                generate(pipe)
            elif act == "a":
                lora(pipe)
                torch.manual_seed(0)
                for name, weight in pipe.transformer.named_parameters():
                    if "lora_" in name:
                        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
            else:
                layer = torch.nn.Linear(*pipe.transformer.proj_out.weight.T.shape, bias=False)
                torch.nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(2))
                pipe.transformer.proj_out = layer
        return generate(pipe)

    for change in "al":
        torch.testing.assert_close(made("c" + change), made(change + "c"), rtol=1e-4, atol=1e-4)


@pytest.mark.compiled
def test_kinds_of_pass_may_be_more_than_torch_keeps_by_itself():
    """Each kind of pass and size is a graph; torch refuses beyond a limit, 8 by default and 1 here."""
    pipe = family_pipeline("ltx2", blocks=2)
    CompiledSchedule((True, False), backend="eager").apply(pipe)
    with torch._dynamo.config.patch(recompile_limit=1):
        made = family_sample(pipe, steps=2, stg_scale=1.0, modality_scale=3.0, spatio_temporal_guidance_blocks=[1])
    assert made.isfinite().all()
    assert set(compiled_schedule_report(pipe).passes) == {"cond_uncond", "uncond_stg", "uncond_modality"}


@pytest.mark.parametrize("first", [0, 1])
def test_hooks_come_off_in_any_order(first):
    pipe = small_pipeline()
    expected = generate(pipe)
    techniques = [FixedInterval(2), GuidanceCache(2)]
    for technique in techniques:
        technique.apply(pipe)
    both = generate(pipe)
    techniques[first].remove(pipe)
    left = techniques[1 - first]
    alone = generate(pipe)
    assert not torch.equal(alone, both)
    assert torch.equal(alone, generate(left.apply(small_pipeline())))
    left.remove(pipe)
    assert not {"_diffusers_hook", "forward"} & set(vars(pipe.transformer))
    assert torch.equal(generate(pipe), expected)


def test_hooks_of_an_offloader_stay_where_they_are():
    """accelerate takes its forward off and puts a new one on after every generation of a pipeline."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, technique = small_pipeline(), FixedInterval(2)
    expected = generate(pipe)
    cached = generate(technique.apply(small_pipeline()))
    add_hook_to_module(pipe.transformer, ModelHook())
    technique.apply(pipe)
    for _ in range(2):
        assert torch.equal(generate(pipe), cached)
        remove_hook_from_module(pipe.transformer)
        add_hook_to_module(pipe.transformer, ModelHook())
    technique.remove(pipe)
    assert torch.equal(generate(pipe), expected)
    technique.apply(pipe)
    remove_hook_from_module(pipe.transformer)
    technique.remove(pipe)
    assert torch.equal(generate(pipe), expected)


def test_a_removal_from_under_a_stranger_is_refused_and_changes_nothing():
    pipe, technique = small_pipeline(), FixedInterval(2)
    technique.apply(pipe)
    ours = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    cached = generate(pipe)
    with pytest.raises(ValueError, match=r"something was put over the cache's forward .* take that off first"):
        technique.remove(pipe)
    assert torch.equal(generate(pipe), cached)
    pipe.transformer.forward = ours
    technique.remove(pipe)


def test_two_steps_with_the_same_rounded_time_are_two_steps():
    """In bfloat16 times near 1 are .004 apart, and a shifted schedule has steps closer than that."""
    pipe = small_pipeline().to(torch.bfloat16)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=40.0)
    FixedSchedule((True, *[False] * 11)).apply(pipe)
    generate(pipe, steps=12)
    assert pattern(step_cache_report(pipe)) == "#" + "." * 11
