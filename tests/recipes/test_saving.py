"""A saved recipe opens by the folder's name alone and makes the same bits."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tiny_pipelines import tiny_pipeline, tiny_run

import diffusion_opt
from diffusion_opt import models
from diffusion_opt.caching import (
    EasyCache,
    FixedInterval,
    GenerationRegionCache,
    GuidanceCache,
    MagCache,
    StepTable,
    TeaCache,
    calibrate_step_cache,
    step_cache_report,
)
from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.quantization import PTQ, Bfloat16, DynamicInt8, LowPrecisionAttention, pack
from diffusion_opt.quantization.packed import storage
from diffusion_opt.recipes import Recipe, Solver, Student, load, save
from diffusion_opt.subjects import Run, denoisers


def images(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([3, "bag"], generator=torch.Generator().manual_seed(5), output_type="pt").images


def comes_back(pipe: DiffusionPipeline, recipe: Recipe, folder: Path) -> DiffusionPipeline:
    """Apply, save, open: the same bits, and the saved pipeline is as it was."""
    recipe.apply(pipe)
    made = images(pipe)
    save(pipe, folder)
    assert torch.equal(images(pipe), made)
    opened = diffusion_opt.load(folder)
    assert torch.equal(images(opened), made)
    return opened


RECIPES = {
    "nothing": (),
    "solver": (Solver(4),),
    "caches": (Solver(6), TeaCache(0.5), GuidanceCache(1, interval=(0.3, 0.9))),
    "guidance cache": (GuidanceCache(2),),
    "int8": (DynamicInt8(min_width=0), FixedInterval(2)),
    "int8, attention, cache": (
        Solver(5, "euler"), DynamicInt8(min_width=0), LowPrecisionAttention("int8"), EasyCache(0.5, warmup=1),
    ),
    "bfloat16": (Bfloat16(require_fast=False), TeaCache(0.5)),
    "attention": (LowPrecisionAttention("fp8"),),
    "region": (GenerationRegionCache(),),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back(name: str, pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    opened = comes_back(pipe, Recipe(RECIPES[name]), tmp_path / "saved")
    if any(isinstance(technique, TeaCache | FixedInterval) for technique in RECIPES[name]):
        assert step_cache_report(opened).total_skipped > 0
    save(opened, tmp_path / "again")
    assert torch.equal(images(load(tmp_path / "again")), images(opened))


def test_a_student_with_its_times_and_int8(pipe: TinyFlux2Pipeline, tmp_path: Path, student_folder: Path) -> None:
    recipe = Recipe((Student(str(student_folder)), DynamicInt8(min_width=0)))
    opened = comes_back(pipe, recipe, tmp_path / "saved")
    assert opened.config.is_distilled and opened.config.default_steps == 1
    held = json.loads((tmp_path / "saved" / "recipe.json").read_text())["held"]
    assert held == [technique.describe() for technique in recipe.techniques]


def test_calibrations_travel_with_the_folder(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    """Calibrated on the quantized network, copied into the folder, found where the folder was moved to."""
    Recipe((DynamicInt8(min_width=0),)).apply(pipe)
    path = tmp_path / "calibration.json"
    calibrate_step_cache(pipe, Run(("bag", "coat"), guidance_scale=2.0)).save(path)
    for technique in (TeaCache(3.0, curve=str(path)), MagCache(0.5, calibration=str(path)), StepTable(3.0, str(path))):
        recipe = Recipe((technique,)).apply(pipe) and Recipe((technique,))
        made = images(pipe)
        save(pipe, tmp_path / type(technique).__name__)
        recipe.remove(pipe)
    path.unlink()
    (tmp_path / "StepTable").rename(tmp_path / "elsewhere")
    opened = load(tmp_path / "elsewhere")
    assert torch.equal(images(opened), made)
    assert step_cache_report(opened).total_skipped > 0
    assert torch.equal(images(load(tmp_path / "TeaCache")), images(load(tmp_path / "TeaCache")))


def test_packed_weights_under_a_cache(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    recipe = Recipe((PTQ("nvfp4", run=Run(("bag",)), samples=1), FixedInterval(2)))
    recipe.apply(pipe)
    with pytest.raises(ValueError, match=r"simulation.*pack"):
        save(pipe, tmp_path / "saved")
    made = images(pack(pipe))
    save(pipe, tmp_path / "saved")
    assert torch.equal(images(load(tmp_path / "saved")), made)


@pytest.mark.parametrize("name", ["flux2-klein", "wan2.2"])
def test_pipelines_of_diffusers(name: str, tmp_path: Path) -> None:
    """Ours brings the recipe back; diffusers alone opens network, scheduler and the rest."""
    pipe, run = tiny_pipeline(name), tiny_run(name, 6, batch_size=1)
    two = len(denoisers(pipe)) > 1
    other = tiny_pipeline(name)
    with torch.no_grad():
        for network in denoisers(other).values():
            for parameter in network.parameters():
                parameter.mul_(1.05)
    other.save_pretrained(tmp_path / "student")
    techniques = (Student(str(tmp_path / "student")), *(() if two else (TeaCache(50.0),)))
    Recipe(techniques).apply(pipe)
    made = run.generate(pipe, [0])
    save(pipe, tmp_path / "saved")
    assert torch.equal(run.generate(load(tmp_path / "saved"), [0]), made)
    alone = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    Recipe(techniques[1:]).apply(alone)
    assert torch.equal(run.generate(alone, [0]), made)


def test_each_part_has_the_type_it_had(tmp_path: Path) -> None:
    pipe, run = tiny_pipeline("flux2-klein"), tiny_run("flux2-klein", 2, batch_size=1)
    pipe.vae.to(torch.bfloat16)
    made = run.generate(pipe, [0])
    save(pipe, tmp_path / "saved")
    opened = load(tmp_path / "saved")
    assert opened.vae.dtype == torch.bfloat16 and opened.transformer.dtype == torch.float32
    assert torch.equal(run.generate(opened, [0]), made)


def test_what_no_recipe_put_on_is_refused(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    TeaCache(0.5).apply(pipe)
    with pytest.raises(ValueError, match="no recipe put there"):
        save(pipe, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    TeaCache(0.5).remove(pipe)
    Recipe((TeaCache(0.5),)).apply(pipe)
    TeaCache(0.5).remove(pipe)  # by itself: the folder does not say it
    save(pipe, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "recipe.json").read_text())["techniques"] == []


def test_adapters_are_no_part_of_a_folder(tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux2-klein")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="is a LoRA layer"):
        save(pipe, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_other_doors_say_who_opens_it(pipe: TinyFlux2Pipeline, tmp_path: Path, teacher_folder: Path) -> None:
    Recipe((FixedInterval(2),)).apply(pipe)
    save(pipe, tmp_path / "saved")
    for door in (models.load, storage.load):
        with pytest.raises(ValueError, match=r"diffusion_opt\.load"):
            door(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"recipe besides its network \(fixed_interval\)"):
        Student(str(tmp_path / "saved")).apply(load(teacher_folder))
    with pytest.raises(ValueError, match="not empty"):
        save(pipe, tmp_path / "saved")


def test_damage_is_noticed(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    Recipe((FixedInterval(2),)).apply(pipe)
    save(pipe, tmp_path / "saved")
    record = tmp_path / "saved" / "recipe.json"
    record.write_text(record.read_text().replace("fixed_interval", "fixed_schedule"))
    with pytest.raises(CorruptFileError, match="damaged"):
        load(tmp_path / "saved")
