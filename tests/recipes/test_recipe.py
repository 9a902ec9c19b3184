"""Recipes: checked before they act, all or nothing, reversible to the bit, plain JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffusion_opt
from diffusion_opt.caching import (
    ChunkRegionCache,
    CompiledSchedule,
    EasyCache,
    EditRegionCache,
    ErrorBoundedCache,
    FirstBlockCache,
    FixedInterval,
    FixedSchedule,
    GenerationRegionCache,
    GuidanceCache,
    MagCache,
    ReferenceRegionCache,
    ScheduledCache,
    StepTable,
    StreamingRegionCache,
    TeaCache,
)
from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler, TinyFlux2Pipeline
from diffusion_opt.quantization import PTQ, DynamicInt8
from diffusion_opt.recipes import TECHNIQUES, Compile, Recipe, Solver, Student, Technique, apply
from diffusion_opt.subjects import Run


def images(pipe: TinyFlux2Pipeline) -> torch.Tensor:
    return pipe([3, "bag"], generator=torch.Generator().manual_seed(5), output_type="pt").images


class _Refuses:
    """A technique that never fits."""


def test_solver_changes_steps_and_scheduler_and_back(pipe: TinyFlux2Pipeline) -> None:
    before = images(pipe)
    technique = Solver(3)
    technique.apply(pipe)
    assert isinstance(pipe.scheduler, FlowMatchAdamsBashforthScheduler)
    passes = []
    handle = pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    assert not torch.equal(images(pipe), before)
    handle.remove()
    assert len(passes) == 6  # 3 steps, two passes each for guidance
    technique.remove(pipe)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(images(pipe), before)


def test_euler_with_the_teacher_s_own_steps_changes_nothing(pipe: TinyFlux2Pipeline) -> None:
    before = images(pipe)
    assert torch.equal(images(Solver(6, "euler").apply(pipe)), before)


def test_student_replaces_network_steps_and_guidance_and_back(pipe: TinyFlux2Pipeline, student_folder: Path) -> None:
    before = images(pipe)
    technique = Student(str(student_folder))
    technique.apply(pipe)
    passes = []
    handle = pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    student = images(pipe)
    handle.remove()
    assert len(passes) == 1
    assert torch.equal(student, images(diffusion_opt.load(student_folder)))
    technique.remove(pipe)
    assert torch.equal(images(pipe), before)


def test_a_student_keeps_its_own_solver(pipe: TinyFlux2Pipeline, student_folder: Path) -> None:
    before = images(pipe)
    with pytest.raises(ValueError, match="distilled for its own steps"):
        Recipe((Student(str(student_folder)), Solver(8))).apply(pipe)
    assert torch.equal(images(pipe), before)  # the student was taken back
    assert pipe.config.default_steps == 6


def test_combined_recipe_is_undone_in_reverse(pipe: TinyFlux2Pipeline, student_folder: Path) -> None:
    before = images(pipe)
    recipe = Recipe((Student(str(student_folder)), DynamicInt8(min_width=16)))
    recipe.apply(pipe)
    assert not torch.equal(images(pipe), before)
    recipe.remove(pipe)
    assert torch.equal(images(pipe), before)


def test_the_empty_recipe_changes_nothing(pipe: TinyFlux2Pipeline) -> None:
    before = images(pipe)
    assert torch.equal(images(Recipe().apply(pipe)), before)
    assert Recipe().describe() == "as it comes"


def test_order_and_conflicts_are_checked_before_anything_is_touched() -> None:
    with pytest.raises(ValueError, match="change the solver once"):
        Recipe((Solver(3), Solver(4)))
    with pytest.raises(ValueError, match="the network must be changed before the weights"):
        Recipe((DynamicInt8(), Student("fashion-1step")))
    with pytest.raises(ValueError, match="unknown technique"):
        Recipe((_Refuses(),))


def test_recipes_round_trip_through_json(tmp_path: Path) -> None:
    recipe = Recipe((Student("fashion-1step"), DynamicInt8(), Compile()))
    recipe.save(tmp_path / "fast.json")
    assert Recipe.load(tmp_path / "fast.json") == recipe
    assert json.loads((tmp_path / "fast.json").read_text())["techniques"][0] == {
        "technique": "student",
        "model": "fashion-1step",
    }


@pytest.mark.parametrize(
    "technique",
    [
        FixedInterval(3),
        FixedSchedule((True, True, False, True), "reuse"),
        TeaCache(0.2, curve="FLUX.1-dev"),
        FirstBlockCache(0.1),
        MagCache(0.1, "calibration.json"),
        EasyCache(0.1, warmup=5),
        StepTable(0.1, "calibration.json", "hermite"),
        ScheduledCache("fashion-10"),
        ErrorBoundedCache(0.03, "fashion-error-bound"),
        CompiledSchedule((True, True, False, True)),
        StreamingRegionCache(0.01),
        EditRegionCache(),
        GenerationRegionCache(0.5),
        ReferenceRegionCache(),
        ChunkRegionCache(0.2),
    ],
    ids=lambda technique: type(technique).__name__,
)
def test_caches_are_recipes_too_and_exclude_each_other(technique: Technique, tmp_path: Path) -> None:
    recipe = Recipe((Solver(8), technique))
    recipe.save(tmp_path / "cached.json")
    assert Recipe.load(tmp_path / "cached.json") == recipe
    with pytest.raises(ValueError, match="change the cache once"):
        Recipe((technique, TeaCache(0.1)))


def test_a_step_cache_and_a_guidance_cache_go_together(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    before = images(pipe)
    recipe = Recipe((FixedInterval(2), GuidanceCache(2)))
    recipe.save(tmp_path / "cached.json")
    assert Recipe.load(tmp_path / "cached.json") == recipe
    assert not torch.equal(images(recipe.apply(pipe)), before)
    recipe.remove(pipe)
    assert torch.equal(images(pipe), before)
    with pytest.raises(ValueError, match="the cache must be changed before the guidance cache"):
        Recipe((GuidanceCache(2), FixedInterval(2)))


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        (
            (ChunkRegionCache(0.1), GuidanceCache(2)),
            "some of the tokens of a pass, and GuidanceCache takes whole",
        ),
        ((StreamingRegionCache(), Compile()), "and Compile takes whole passes"),
        ((CompiledSchedule((True, False)), Compile()), "leave Compile out"),
        ((DynamicInt8(), CompiledSchedule((True, False))), "layers of DynamicInt8 cannot be captured"),
        ((PTQ("int8"), CompiledSchedule((True, False))), "layers of PTQ cannot be captured: use FixedSchedule"),
    ],
)
def test_what_lies_in_order_and_does_not_go_together_is_refused_beforehand(techniques: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(techniques)


@pytest.mark.parametrize("technique", [DynamicInt8(min_width=0), PTQ("int8", samples=1)])
def test_a_compiled_schedule_alone_refuses_layers_that_cannot_be_captured(pipe, technique) -> None:
    technique.apply(pipe)
    with pytest.raises(ValueError, match="which cannot be captured: use FixedSchedule with the same mask"):
        CompiledSchedule((True, False, True)).apply(pipe)
    technique.remove(pipe)
    CompiledSchedule((True, False, True)).apply(pipe)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"technique": "magic"}, "unknown technique 'magic'"),
        ({"technique": "tea_cach"}, r"unknown technique 'tea_cach' in recipe \(did you mean tea_cache\?\)"),
        ({"technique": "solver", "steps": 4, "order": 3}, "'solver' has no setting 'order'"),
        ({"technique": "solver", "step": 4}, r"no setting 'step' \(did you mean steps\?\); it has steps, name"),
        ({"technique": "solver", "steps": 0}, "steps must be at least 1, got 0"),
        ({"technique": "fixed_interval", "every": 1.5}, "every must be 1 .* got 1.5"),
        ({"technique": "fixed_interval", "every": "2"}, "every must be 1 .* got '2'"),
        ({"technique": "fixed_interval"}, "technique 'fixed_interval' of the recipe: .*every"),
        ({"technique": ["fixed_interval"]}, "an entry of a recipe is"),
        ("fixed_interval", "an entry of a recipe is"),
    ],
)
def test_a_bad_entry_is_named(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({"techniques": [entry]})


def test_a_technique_with_a_run_goes_to_a_file_unless_the_run_holds_pictures(tmp_path: Path) -> None:
    run = Run(("a cat", "a dog"), num_inference_steps=4, height=64, arguments={"max_sequence_length": 32})
    recipe = Recipe((PTQ("int8", run=run, samples=2),))
    recipe.save(tmp_path / "ptq.json")
    assert Recipe.load(tmp_path / "ptq.json") == recipe
    with_picture = Recipe((PTQ("int8", run=replace(run, arguments={"image": torch.zeros(3, 8, 8)})),))
    with pytest.raises(
        ValueError, match=r"run of 'ptq' cannot be written to a file .*: leave pictures and tensors out"
    ):
        with_picture.save(tmp_path / "picture.json")
    assert not (tmp_path / "picture.json").exists()


def test_what_is_no_recipe_is_said(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="a recipe is"):
        Recipe.load(tmp_path / "list.json")
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"save the recipe again"):
        Recipe.load(tmp_path / "cut.json")


def test_every_technique_has_the_verbs() -> None:
    for technique, _ in TECHNIQUES.values():
        assert all(callable(getattr(technique, verb)) for verb in ("apply", "remove", "describe"))


def test_removing_what_was_not_applied_is_an_error(pipe: TinyFlux2Pipeline) -> None:
    with pytest.raises(ValueError, match="Solver is not applied"):
        Solver(3).remove(pipe)


def test_apply_is_short_for_a_recipe(pipe: TinyFlux2Pipeline) -> None:
    assert apply(pipe, Solver(2, "euler")) is pipe
    assert pipe.config.default_steps == 2


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_blocks_give_the_same_images(pipe: TinyFlux2Pipeline) -> None:
    before = images(pipe)
    technique = Compile()
    technique.apply(pipe)
    assert torch.allclose(images(pipe), before, atol=1e-4)
    technique.remove(pipe)
    assert torch.equal(images(pipe), before)
