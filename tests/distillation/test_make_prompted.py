"""Students of pipelines with prompts: trained by the same call, saved as pipelines that open and repeat their seeds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.make import StudentPlan, make_student
from diffusion_opt.distillation.methods import METHODS, method_named
from diffusion_opt.distillation.opening import check_served
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.models import load
from diffusion_opt.models.fingerprint import identity
from diffusion_opt.models.student_scheduler import StudentScheduler
from diffusion_opt.subjects import PromptedPipeline
from diffusion_opt.training import TrainConfig

BRIEF = TrainConfig(steps=2, batch_size=2, warmup_steps=1, learning_rate=1e-3)


def subject_of(name: str, data: ImageData | None = None) -> PromptedPipeline:
    run = tiny_run(name)
    if name.startswith("ltx2"):
        plain = {"audio_guidance_scale": run.guidance_scale, "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}
        run = replace(run, arguments={**run.arguments, **plain})
    return PromptedPipeline(tiny_pipeline(name), run, name=name, data=data)


def at_once(name: str):
    """The method with a single update of its critic before the student's."""
    found = METHODS[name]
    return replace(found, build=lambda task: replace(found.build(task), warmup=1))


def latents(pipe: DiffusionPipeline, seed: int = 0) -> torch.Tensor:
    """What the pipeline makes by its own defaults."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt="a cat", generator=generator, max_sequence_length=32, output_type="latent", return_dict=False)[0]


def changed(student: DiffusionPipeline, subject: PromptedPipeline) -> bool:
    now, before = student.transformer.state_dict(), subject.transformer.state_dict()
    assert now.keys() == before.keys()  # no adapter is left in either
    return any(not torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "rank"), [("flux2-klein", 4), ("wan", None), pytest.param("ltx2-cfg", 4, marks=pytest.mark.slow)]
)
def test_two_steps_of_training_and_a_pipeline_that_opens(name: str, rank: int | None, tmp_path: Path) -> None:
    subject = subject_of(name)
    plan = StudentPlan(name, "dmd2", 4, lora_rank=rank, times=(1.0, 0.9, 0.8, 0.6))
    student, result = make_student(plan, BRIEF, tmp_path, progress=False, method=at_once("dmd2"), subject=subject)
    assert result.finished and result.step == 2 and changed(student, subject)
    assert identity(subject.transformer) == identity(tiny_pipeline(name).transformer)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file() == (rank is not None)
    passes = []
    opened = load(tmp_path / "pipeline")
    opened.transformer.register_forward_hook(lambda *_: passes.append(1))
    first = latents(opened)
    assert len(passes) == 4  # of the ladder, without guidance
    assert torch.equal(first, latents(student)) and torch.equal(first, latents(opened))
    assert not torch.equal(first, latents(opened, seed=1))
    plain = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(plain.scheduler, StudentScheduler) and plain.scheduler.config.renoise
    assert plain.scheduler.config.ladders == [[1.0, 0.9, 0.8, 0.6]]
    with pytest.raises(ValueError, match="trained for 4 steps, got num_inference_steps=7"):
        plain("a cat", num_inference_steps=7) if name == "wan" else plain(prompt="a cat", num_inference_steps=7)


def test_an_adapter_alone_does_what_the_folded_one_does(tmp_path: Path) -> None:
    subject = subject_of("wan")
    plan = StudentPlan("wan", "dmd2", 1, lora_rank=4)
    student, _ = make_student(plan, BRIEF, tmp_path, progress=False, method=at_once("dmd2"), subject=subject)
    bare = tiny_pipeline("wan")
    bare.load_lora_weights(tmp_path / "lora")
    bare.scheduler = StudentScheduler([[1.0]])
    bare.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0}
    made = bare("a cat", generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=32,
                return_dict=False, **call)[0]  # fmt: skip
    torch.testing.assert_close(made, latents(student), rtol=1e-3, atol=1e-4)


def test_trajectories_belong_to_their_teacher_and_their_prompts(tmp_path: Path) -> None:
    pairs = PairConfig(4, 5.0, num_rungs=2, num_steps=2, shard_size=2)
    plan = StudentPlan("wan", "ode", 2, pairs=pairs)
    make_student(plan, BRIEF, tmp_path / "a", tmp_path / "pairs", progress=False, subject=subject_of("wan"))
    assert (tmp_path / "pairs" / "manifest.json").is_file()
    other = PromptedPipeline(tiny_pipeline("wan"), tiny_run("wan", prompts=("a boat", "a tree")), name="boats")
    with pytest.raises(ValueError, match=r"holds trajectories of the teacher 'wan' .* now it is 'boats'"):
        make_student(plan, BRIEF, tmp_path / "b", tmp_path / "pairs", progress=False, subject=other)
    with pytest.raises(ValueError, match=r"holds a student whose teacher is 'wan' .*, now it is 'boats'"):
        make_student(plan, BRIEF, tmp_path / "a", tmp_path / "pairs", progress=False, subject=other)


def test_methods_that_learn_from_pictures_take_latents(tmp_path: Path) -> None:
    bare = subject_of("sd3")
    data = ImageData(torch.randn(4, *bare.sample_shape), torch.tensor([0, 1, 0, 1]), bare.run.prompts)
    with pytest.raises(ValueError, match="learns from pictures, and sd3 was given none"):
        make_student(StudentPlan("sd3", "consistency", 2), BRIEF, tmp_path / "none", progress=False, subject=bare)
    plan = StudentPlan("sd3", "consistency", 2)
    student, _ = make_student(plan, BRIEF, tmp_path / "a", progress=False, subject=subject_of("sd3", data))
    assert student.scheduler.config.ladders == [[1.0], [1.0, 0.5], [1.0, 0.9, 0.75, 0.5]]
    other = ImageData(data.images + 1, data.labels, data.class_names)
    with pytest.raises(ValueError, match="holds a student with data="):
        make_student(plan, BRIEF, tmp_path / "a", progress=False, subject=subject_of("sd3", other))


def test_a_student_starts_from_a_student(tmp_path: Path) -> None:
    subject = subject_of("wan")
    pairs = PairConfig(2, 5.0, num_rungs=1, num_steps=1, shard_size=2)
    first, _ = make_student(
        StudentPlan("wan", "ode", 1, pairs=pairs), BRIEF, tmp_path / "a", progress=False, subject=subject
    )
    plan = StudentPlan("wan", "dmd2", 1, start=str(tmp_path / "a" / "pipeline"))
    begun = subject.begin(plan.start, "start", 1, 5.0)
    assert torch.equal(begun.network.transformer.proj_out.weight, first.transformer.proj_out.weight)
    make_student(plan, replace(BRIEF, steps=1), tmp_path / "b", progress=False, subject=subject)


def test_flow_maps_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no place for the length of a jump"):
        make_student(
            StudentPlan("wan", "flow_map", 1), BRIEF, tmp_path / "x", progress=False, subject=subject_of("wan")
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "method", "call", "message"),
    [
        ("wan2.2", "ode", {}, "Take a model with one"),
        ("flux2-klein", "flow_map", {}, "has no place for the length of a jump.*use ode, consistency"),
        ("flux2-klein", "lcm", {}, "has no place for the scale"),
        ("flux2-klein", "ladd", {}, "learns from pictures, and .* was given none"),
        ("flux2-klein", "ode", {"image": "a picture"}, "distill the pipeline without a picture"),
        ("hunyuan-video-1.5", "ode", {}, "use caches and quantization"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_a_weight_is_read(name, method, call, message, tmp_path) -> None:
    tiny_pipeline(name).save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=message):
        check_served(str(tmp_path), method_named(method), arguments=call)
    if name == "flux2-klein":
        check_served(str(tmp_path), method_named("ode"))
