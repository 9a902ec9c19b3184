"""What a recipe does to a plan agrees with what is measured on small models, byte for byte and product for product."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.caching import FixedInterval, FixedSchedule, GuidanceCache, TeaCache
from diffusion_opt.evaluation.cost import count
from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.quantization import PTQ, W8A8, DynamicInt8, LowPrecisionAttention, pack
from diffusion_opt.recipes import Compile, Recipe, Solver, Student
from diffusion_opt.recipes.outlook import gpu_named, lines, outlook, steps_of_student
from diffusion_opt.subjects import known
from diffusion_opt.subjects.plan import plan, skeleton


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outlook") / "klein"
    tiny_pipeline("flux2-klein").save_pretrained(path)
    return path


def planned(folder: Path, recipe: Recipe, steps: int = 6):
    pipe, run = skeleton(folder), tiny_run("flux2-klein", steps, batch_size=1)
    return outlook(plan(pipe, run, torch.float32), pipe, recipe)


@pytest.mark.parametrize(
    "technique",
    [DynamicInt8(min_width=0), W8A8("e4m3", require_fast=False), PTQ("nvfp4", samples=1), PTQ("int8", samples=1)],
)
def test_bytes_of_weights_are_those_of_the_quantized_pipeline(folder: Path, technique) -> None:
    pipe, run = tiny_pipeline("flux2-klein"), tiny_run("flux2-klein", 2, batch_size=1)
    row = planned(folder, Recipe((technique,)))[-1]
    if isinstance(technique, PTQ):
        technique = PTQ(technique.format, run=run, samples=1)
    technique.apply(pipe)
    if isinstance(technique, PTQ):
        pack(pipe)
    assert row.weight_bytes == pytest.approx(weight_bytes(pipe.transformer), rel=0.03)  # kernels keep sums of rows


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe((Solver(3),)),
        Recipe((GuidanceCache(1, interval=(0.4, 0.9)),)),
        Recipe((Solver(4), FixedSchedule((True, True, False, True), "reuse"))),
    ],
)
def test_arithmetic_is_that_of_the_call(folder: Path, recipe: Recipe) -> None:
    """A skipped step still embeds and projects, which the plan leaves out: within a twentieth of the whole."""
    pipe, run = tiny_pipeline("flux2-klein"), tiny_run("flux2-klein", 6, batch_size=1)
    recipe.apply(pipe)
    steps = next((t.steps for t in recipe.techniques if isinstance(t, Solver)), 6)
    found = count(lambda: run.generate(pipe, [0], num_inference_steps=steps), pipe.transformer)
    row = planned(folder, recipe)[-1]
    assert row.macs == pytest.approx(found.macs, rel=0.12 if len(recipe.techniques) > 1 else 0.05)


def test_caches_keep_anchors_and_promise_nothing(folder: Path) -> None:
    before, adaptive, fixed = (planned(folder, Recipe(t))[-1] for t in ((), (TeaCache(0.2),), (FixedInterval(2),)))
    assert adaptive.macs == before.macs and "each step it skips spares" in adaptive.note
    assert adaptive.cache_bytes == fixed.cache_bytes > 0 == before.cache_bytes
    assert fixed.macs == before.macs / 2


def test_students_and_what_changes_no_count(folder: Path) -> None:
    assert steps_of_student("fashion-4step") == 4 and steps_of_student("flux2-klein") == 4
    with pytest.raises(ValueError, match="not known without opening"):
        steps_of_student("some/where")
    row = planned(folder, Recipe((Student("flux2-klein"), Compile())))[-1]
    assert row.passes == 4 and "for a measurement" in row.note


def test_a_large_model_on_a_gpu_by_its_configuration_alone() -> None:
    """FLUX.2 klein base: 8-bit products at twice the rate bound time by half, and weights shrink by nearly half."""
    pipe, run = known.skeleton("flux2-klein-base"), known.run("flux2-klein-base", num_inference_steps=2)
    found, gpu = plan(pipe, run, torch.bfloat16), gpu_named("h200")
    plain, eight, both = outlook(found, pipe, Recipe((W8A8("e4m3"), LowPrecisionAttention("fp8"))), gpu)
    assert plain.passes == 4 and plain.weight_bytes == 2 * found.parameters["transformer"]
    assert 0.5 < eight.weight_bytes / plain.weight_bytes < 0.6
    assert both.seconds == pytest.approx(plain.seconds / 2, rel=0.02) and eight.seconds > both.seconds
    tokens, width, blocks = 4096 + 512, 3072, 25
    assert found.first.attention_macs == pytest.approx(2 * tokens**2 * width * blocks, rel=1e-6)
    assert "H200" in lines([plain, eight], gpu)[-1]


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no GPU 'h2000' \(did you mean h200\?\)"):
        gpu_named("h2000")
    assert gpu_named("H100").memory_gb_per_s < gpu_named("H200").memory_gb_per_s
