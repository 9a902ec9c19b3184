"""Advice is what happens when it is followed: every status is tried, every command is parsed, every preset applies."""

import shlex
from dataclasses import replace

import pytest
from tiny_pipelines import tiny_pipeline, tiny_run

import diffusion_opt
from diffusion_opt.cli.commands import COMMANDS, find, parsed
from diffusion_opt.models import TinyFlux2Pipeline, load
from diffusion_opt.names import KNOWN
from diffusion_opt.quantization import W8A8
from diffusion_opt.recipes import Recipe, Student
from diffusion_opt.recipes.advice import Facts, advise
from diffusion_opt.recipes.presets import GOALS, MODELS, preset
from diffusion_opt.subjects import Run, denoisers, known

TINY_OF = {  # the tiny pipeline of the class of each model
    "flux2-dev": "flux2-dev", "flux2-klein-base": "flux2-klein", "flux2-klein": "flux2-klein-distilled",
    "ltx-2": "ltx2", "wan2.1": "wan", "wan2.1-1.3b": "wan", "wan2.2": "wan2.2",
}  # fmt: skip


def parse(command: str) -> None:
    """Raises if the command line does not take it; nothing is run."""
    import importlib

    program, *words = shlex.split(command)
    assert program == "diffusion-opt"
    name, rest = find(words)
    module, _, function = COMMANDS[name].target.partition(":")
    parsed(f"diffusion-opt {name}", getattr(importlib.import_module(module), function), rest)


def statuses(found) -> dict[str, str]:
    return {item.technique: item.status for item in found.items}


def test_a_teacher_with_guidance_is_told_everything_in_order(pipe: TinyFlux2Pipeline) -> None:
    found = advise(pipe, Run.for_pipeline(pipe), "fashion", ["--prompts", "bag", "--steps", "6"])
    assert set(statuses(found).values()) == {"applies"}
    names = [item.technique for item in found.items]
    assert names.index("weights in 8 bits or fewer") < names.index("a step cache") < names.index("torch.compile")
    assert found.facts.passes == 12 and "guidance is a pass of its own" in "\n".join(found.lines())
    for command in found.commands:
        parse(command)


def test_a_step_cache_on_a_student_is_useless_and_it_says_why() -> None:
    pipe = load("fashion-4step")
    found = advise(pipe, Run.for_pipeline(pipe), "fashion-4step")
    says = {item.technique: item for item in found.items}
    for name in ("a step cache", "guidance at some steps only", "a student of few steps"):
        assert says[name].status == "useless", name
    assert "4 steps leave nothing to skip" in says["a step cache"].why
    assert "Solver: this student was distilled" in says["another solver"].why
    assert not any("cache" in command or "distill" in command for command in found.commands)


@pytest.mark.parametrize(("name", "expected"), [
    ("flux2-dev", {"guidance at some steps only": "useless", "a step cache": "applies"}),
    ("wan2.2", {"guidance at some steps only": "refused", "another solver": "useless", "a region cache": "refused"}),
])  # fmt: skip
def test_other_families(name: str, expected: dict[str, str]) -> None:
    pipe = tiny_pipeline(name)
    before = dict(vars(pipe.transformer))
    found = statuses(advise(pipe, tiny_run(name, 8)))
    assert {key: found[key] for key in expected} == expected
    assert vars(pipe.transformer).keys() == before.keys(), "left as it was"


def test_a_unet_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="UNet"):
        advise(tiny_pipeline("sdxl"), tiny_run("sdxl", 4))


@pytest.mark.parametrize("name", ["flux2-klein-base", "wan2.1-1.3b"])
def test_a_large_model_is_advised_without_weights(name: str) -> None:
    pipe = known.skeleton(name)
    assert all(parameter.is_meta for network in denoisers(pipe).values() for parameter in network.parameters())
    found = advise(pipe, known.run(name), KNOWN[name], ["--prompts", "'a cat'"])
    assert found.facts.passes == 100 and statuses(found)["a step cache"] == "applies"
    for command in found.commands:
        parse(command)


@pytest.mark.parametrize(("name", "billions"), [
    ("flux2-dev", 32.22), ("flux2-klein", 3.88), ("ltx-2", 18.88), ("wan2.1", 14.29), ("wan2.1-1.3b", 1.42),
])  # fmt: skip
def test_configurations_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    pipe = known.skeleton(name)
    assert round(sum(p.numel() for p in pipe.transformer.parameters()) / 1e9, 2) == billions
    assert known.find(KNOWN[name]).short == name
    if name == "ltx-2":  # 768x512, 121 frames: 16 x 24 x 16 = 6,144 tokens
        assert (pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio) == (32, 8)


def test_unknown_names_are_answered() -> None:
    with pytest.raises(ValueError, match=r"did you mean flux2-klein"):
        preset("flux2-klien")
    with pytest.raises(ValueError, match=r"goal must be one of quality, balanced, fast"):
        preset("fashion", "best")
    with pytest.raises(ValueError, match="no configuration of"):
        known.find("other")


def test_every_preset_says_where_its_numbers_come_from() -> None:
    for model in MODELS:
        for goal in GOALS:
            found = diffusion_opt.preset(model, goal=goal)
            assert ("not yet measured on a GPU" in found.source) == (model in KNOWN)
            assert Recipe.from_dict(found.recipe.to_dict()) == found.recipe
    assert diffusion_opt.preset(KNOWN["ltx-2"]).model == "ltx-2"


@pytest.mark.parametrize("model", KNOWN)
def test_presets_apply_to_pipelines_of_their_class(model: str) -> None:
    """On a CPU without the requirement to be fast; a student of the hub is left out."""
    pipe = tiny_pipeline(TINY_OF[model])
    for goal in GOALS:
        techniques = [
            replace(technique, require_fast=False, min_width=0) if isinstance(technique, W8A8) else technique
            for technique in preset(model, goal).recipe.techniques
            if not isinstance(technique, Student)
        ]
        recipe = Recipe(tuple(techniques))
        recipe.apply(pipe)
        recipe.remove(pipe)


def test_a_preset_without_its_kernel_is_refused_before_anything_is_touched() -> None:
    pipe = tiny_pipeline("flux2-klein")
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="W8A8"):
        preset("flux2-klein-base").recipe.apply(pipe)
    assert pipe.scheduler is scheduler


def test_facts(pipe: TinyFlux2Pipeline) -> None:
    facts = Facts.of(pipe, Run(("bag",), guidance_scale=1.0))
    assert facts.guidance == "none" and facts.passes == facts.steps == 6 and not facts.few and facts.width == 64
