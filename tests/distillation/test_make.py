"""From a teacher to a student that is an ordinary pipeline, by every method, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from small_pipelines import small_pipeline
from tiny_pipelines import tiny_pipeline

from diffusion_opt.datasets import FolderInUseError, folder_lock
from diffusion_opt.distillation.builders import RENOISED
from diffusion_opt.distillation.make import TEACHERS, StudentPlan, make_student, make_teacher, student_pipeline
from diffusion_opt.distillation.methods import METHODS
from diffusion_opt.distillation.record import RECORD
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.models import SIZES, TinyFlux2Config, TinyFlux2Pipeline, load
from diffusion_opt.training import TrainConfig

BRIEF = TrainConfig(steps=2, batch_size=4, warmup_steps=1)
PAIRS = PairConfig(num_pairs=8, guidance_scale=2.0, num_rungs=2, num_steps=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    pipe = small_pipeline(TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=8), std=0.05)
    folder = tmp_path_factory.mktemp("teacher")
    pipe.save_pretrained(folder)
    return str(folder)


def student(teacher: str, out: Path, steps: int, config: TrainConfig = BRIEF, **plan: object):
    made = StudentPlan(teacher, "ode", steps, 2.0, pairs=PAIRS, **plan)
    return make_student(made, config, out, out.parent / "pairs", progress=False)


def images(pipe: TinyFlux2Pipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(["bag", 3], generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_is_a_pipeline_that_knows_its_steps(teacher: str, tmp_path: Path, steps: int) -> None:
    pipe, result = student(teacher, tmp_path / "run", steps)
    assert result.finished and result.step == 2
    reloaded = load(tmp_path / "run" / "pipeline")
    assert (reloaded.config.default_steps, reloaded.config.default_guidance) == (steps, 1.0)
    assert reloaded.config.is_distilled
    passes = []
    reloaded.transformer.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(images(pipe), images(reloaded))
    assert len(passes) == steps
    weights, before = reloaded.transformer.proj_out.weight, load(teacher).transformer.proj_out.weight
    assert not torch.equal(weights, before)


def test_students_share_the_trajectories(teacher: str, tmp_path: Path) -> None:
    student(teacher, tmp_path / "one", 1)
    made = (tmp_path / "pairs" / "pairs-000000.safetensors").stat().st_mtime_ns
    student(teacher, tmp_path / "two", 2)
    assert (tmp_path / "pairs" / "pairs-000000.safetensors").stat().st_mtime_ns == made


def test_a_finished_student_is_not_trained_again(teacher: str, tmp_path: Path) -> None:
    first, _ = student(teacher, tmp_path / "run", 1)
    again, result = student(teacher, tmp_path / "run", 1)
    assert result.step == 2
    assert torch.equal(first.transformer.proj_out.weight, again.transformer.proj_out.weight)


def test_a_folder_belongs_to_one_plan(teacher: str, tmp_path: Path) -> None:
    student(teacher, tmp_path / "run", 1)
    assert json.loads((tmp_path / "run" / RECORD).read_text())["finished"]
    other = StudentPlan(teacher, "flow_map", 1, 2.0)
    with pytest.raises(ValueError, match="holds a student with method='ode', now 'flow_map'; choose another folder"):
        make_student(other, BRIEF, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("method", "steps", "scheduler", "ladders", "flow_map", "guidance"),
    [
        ("ode", 2, FlowMatchEulerDiscreteScheduler, [[1.0, 0.5]], False, 1.0),
        ("progressive", 4, FlowMatchEulerDiscreteScheduler, [[1.0, 0.75, 0.5, 0.25]], False, 1.0),
        ("reflow", 4, FlowMatchEulerDiscreteScheduler, None, False, 1.0),
        ("guidance", 16, FlowMatchEulerDiscreteScheduler, None, False, 1.0),
        ("flow_map", 4, FlowMatchEulerDiscreteScheduler, None, True, 1.0),
        ("consistency", 2, FlowMatchLCMScheduler, [list(times) for times in RENOISED.values()], False, 1.0),
        ("lcm", 4, FlowMatchLCMScheduler, [list(times) for times in RENOISED.values()], False, 2.0),
    ],
)
def test_a_student_is_sampled_as_its_method_wants(
    teacher: str, method: str, steps: int, scheduler: type, ladders: list | None, flow_map: bool, guidance: float
) -> None:
    pipe = student_pipeline(StudentPlan(teacher, method, steps, 2.0), METHODS[method])
    assert type(pipe.scheduler) is scheduler
    config = pipe.config
    assert (config.ladders, config.flow_map, config.default_guidance) == (ladders, flow_map, guidance)
    assert config.default_steps == steps
    assert config.is_distilled == (method != "guidance")  # its steps are the teacher's, any solver may take them
    passes = []
    pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    assert images(pipe).shape == (2, 1, 16, 16)
    assert len(passes) == steps  # guidance is distilled in


TRAJECTORY = [
    name for name, method in METHODS.items() if method.kind == "trajectory" and name != "ode" and not method.starts
]


@pytest.mark.parametrize("name", TRAJECTORY)
def test_every_trajectory_method_trains(teacher: str, tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    steps = min(method.presets)
    plan = StudentPlan(teacher, name, steps, 2.0 if method.guided else None, pairs=PAIRS if method.pairs else None)
    pipe, result = make_student(plan, replace(BRIEF, steps=4), tmp_path / "run", progress=False)
    assert result.finished
    assert images(pipe).isfinite().all()
    assert not torch.equal(pipe.transformer.proj_out.weight, load(teacher).transformer.proj_out.weight)


def test_progressive_distillation_leaves_the_students_of_the_way(teacher: str, tmp_path: Path) -> None:
    make_student(StudentPlan(teacher, "progressive", 2, 2.0), replace(BRIEF, steps=3), tmp_path, progress=False)
    for steps, folder in ((8, "steps-8/pipeline"), (4, "steps-4/pipeline"), (2, "pipeline")):
        assert load(tmp_path / folder).config.default_steps == steps


DISTRIBUTION = [name for name, method in METHODS.items() if method.kind == "distribution"]


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_every_distribution_method_moves_the_student_it_starts_from(teacher: str, tmp_path: Path, name: str) -> None:
    found = METHODS[name]
    at_once = replace(found, build=lambda task: replace(found.build(task), warmup=0))  # the student's turn comes first
    plan = StudentPlan(teacher, name, 1, 2.0 if found.guided else None, start=teacher)
    pipe, _ = make_student(plan, replace(BRIEF, steps=1), tmp_path / "run", progress=False, method=at_once)
    assert (pipe.config.default_steps, pipe.config.is_distilled) == (1, True)
    assert not torch.equal(pipe.transformer.proj_out.weight, load(teacher).transformer.proj_out.weight)


def test_the_distiller_gets_what_the_plan_says(teacher: str, tmp_path: Path) -> None:
    made = []
    found = METHODS["sid"]
    noted = replace(found, build=lambda task: made.append(found.build(task)) or made[0])
    plan = StudentPlan(teacher, "sid", 1, 1.75, teacher, guidance_interval=(0.3, 0.9), fake_updates=1)
    make_student(plan, BRIEF, tmp_path / "run", progress=False, method=noted)
    assert (made[0].teacher.scale, made[0].teacher.interval, made[0].fake_updates) == (1.75, (0.3, 0.9), 1)
    turns = [made[0].turn(step) for step in range(made[0].warmup, made[0].warmup + 4)]
    assert turns == ["student", "fake_score"] * 2


def test_a_flow_map_matched_at_several_steps_stays_a_flow_map(teacher: str, tmp_path: Path) -> None:
    make_student(StudentPlan(teacher, "flow_map", 4, 2.0), BRIEF, tmp_path / "start", progress=False)
    plan = StudentPlan(teacher, "dmd2", 4, 2.0, start=str(tmp_path / "start" / "pipeline"))
    pipe = student_pipeline(plan, METHODS["dmd2"])
    assert pipe.config.flow_map and pipe.config.ladders == [[1.0, 0.75, 0.5, 0.25]]


def test_adapters_are_folded_in(teacher: str, tmp_path: Path) -> None:
    pipe, _ = student(teacher, tmp_path / "run", 1, lora_rank=2)
    reloaded = load(tmp_path / "run" / "pipeline")
    assert torch.equal(images(pipe), images(reloaded))
    weights = load(teacher).transformer.state_dict()
    change = {name: now - weights[name] for name, now in reloaded.transformer.state_dict().items()}
    assert change["proj_out.weight"].abs().max() > 0
    assert torch.linalg.matrix_rank(change["x_embedder.weight"], rtol=1e-3) <= 2
    assert not change["single_transformer_blocks.0.attn.norm_q.weight"].any()  # no linear layer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method must be one of .*dmd2.*, got 'magic'"),
        ({"method": "ode", "steps": 3}, "ode makes students of 1, 2, 4 steps, got 3"),
        ({"method": "dmd2", "num_images": 10}, "dmd2 uses no images"),
        ({"method": "flow_map", "pairs": PAIRS}, "flow_map uses no trajectories"),
        ({"method": "flow_map", "num_images": 0}, "num_images must be at least 1, got 0"),
        ({"method": "ode", "fake_updates": 1}, "ode has no fake score or discriminator"),
        ({"method": "lcm", "guidance_interval": (0.3, 0.9)}, "lcm learns the scale itself, at all times"),
        ({"method": "lcm", "guidance": 8.0}, "students of lcm take guidance 1 … 3, got 8"),
        ({"method": "ladd"}, "ladd learns from the images and not from a guided teacher"),
        ({"method": "mean_flow_data"}, "mean_flow_data learns from the images"),
        (
            {"method": "consistency_training", "guidance": 1.0, "guidance_interval": (0.3, 0.9)},
            "learns from the images",
        ),
        ({"method": "ode", "guidance": 1.0, "guidance_interval": (0.3, 0.9)}, "a guidance scale of 1 is no guidance"),
        ({"method": "ode", "guidance_interval": (0.9, 0.3)}, "the guidance interval must rise"),
        ({"method": "ode", "guidance": 1.5, "pairs": PAIRS}, "the trajectories have guidance 2 in .*, the plan 1.5"),
        ({"method": "scm", "lora_rank": 2}, "scm takes an exact derivative, which adapters do not have"),
        ({"method": "ode", "times": (1.0,)}, "ode trains at times of its own"),
        ({"method": "dmd2", "times": (0.9,)}, "a ladder falls from 1.0"),
        ({"method": "dmd2", "times": (1.0, 0.5)}, "a student of 1 steps has as many times"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentPlan(**{"teacher": "fashion", "steps": 1, "guidance": 2.0, **settings})


def test_a_start_that_does_not_fit_is_refused(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dmd2 starts from a student, by default one of ode"):
        student_pipeline(StudentPlan(teacher, "dmd2", 1, 2.0), METHODS["dmd2"])
    student(teacher, tmp_path / "one", 1)
    start = str(tmp_path / "one" / "pipeline")
    with pytest.raises(ValueError, match="was made for one step, which is too few to start 4 steps from"):
        student_pipeline(StudentPlan(teacher, "dmd2", 4, 2.0, start), METHODS["dmd2"])


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be one of fashion, fashion-micro, got 'huge'"):
        make_teacher("huge", BRIEF, tmp_path)


def test_presets_cover_what_ships() -> None:
    assert TEACHERS.keys() == SIZES.keys()
    assert METHODS["ode"].presets.keys() == {1, 2, 4}
    shipped = METHODS["flow_map"].presets[4]
    assert (shipped.minutes, shipped.learning_rate, shipped.ema_decay) == (45, 5e-4, 0.998)


def test_a_folder_in_which_a_student_is_made_is_held(tmp_path: Path) -> None:
    """From the record on to the pipeline, not for the training alone; and another class of teacher is told apart."""
    with folder_lock(tmp_path, "student"), pytest.raises(FolderInUseError, match=r"in use \(student\) by process"):
        make_student(StudentPlan("fashion-micro", "consistency", 1), TrainConfig(steps=1), tmp_path)
    assert not (tmp_path / "student.json").exists()
    tiny_pipeline("sd3").save_pretrained(tmp_path / "sd3")
    with pytest.raises(
        ValueError, match=r"StableDiffusion3Pipeline, which has no classes.*it is distilled with prompts"
    ):
        make_student(StudentPlan(str(tmp_path / "sd3"), "ode", 1), TrainConfig(steps=1), tmp_path / "out")
