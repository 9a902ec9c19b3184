"""From a teacher to a student that is an ordinary pipeline, by every method, on a tiny model."""

from pathlib import Path

import pytest
import torch
from small_pipelines import small_pipeline

from diffusion_opt.distillation.make import STUDENTS, TEACHERS, make_matched_student, make_student, make_teacher
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.models import SIZES, TinyFlux2Config, load
from diffusion_opt.training import TrainConfig

BRIEF = TrainConfig(steps=2, batch_size=4, warmup_steps=1)
PAIRS = PairConfig(num_pairs=8, guidance_scale=2.0, num_rungs=2, num_steps=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    pipe = small_pipeline(TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=8), std=0.05)
    folder = tmp_path_factory.mktemp("teacher")
    pipe.save_pretrained(folder)
    return str(folder)


def student(teacher: str, out: Path, steps: int):
    return make_student(teacher, steps, BRIEF, PAIRS, out, out.parent / "pairs", progress=False)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_is_a_pipeline_that_knows_its_steps(teacher: str, tmp_path: Path, steps: int) -> None:
    pipe, result = student(teacher, tmp_path / "run", steps)
    assert result.finished and result.step == 2
    reloaded = load(tmp_path / "run" / "pipeline")
    assert (reloaded.config.default_steps, reloaded.config.default_guidance) == (steps, 1.0)
    assert reloaded.config.is_distilled
    passes = []
    reloaded.transformer.register_forward_hook(lambda *_: passes.append(1))
    images = [
        p(["bag", 3], generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipe, reloaded)
    ]
    assert torch.equal(*images)
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


def test_a_matched_student_starts_from_a_one_step_student(teacher: str, tmp_path: Path) -> None:
    student(teacher, tmp_path / "one", 1)
    config = TrainConfig(steps=52, batch_size=2, warmup_steps=1, betas=(0.0, 0.99))
    start = str(tmp_path / "one" / "pipeline")
    pipe, result = make_matched_student(teacher, start, config, 2.0, tmp_path / "dmd", progress=False)
    assert result.step == 52  # 50 of the fake score alone, one of the student, one more of the fake score
    assert (pipe.config.default_steps, pipe.config.is_distilled) == (1, True)
    assert not torch.equal(pipe.transformer.proj_out.weight, load(start).transformer.proj_out.weight)


def test_a_student_of_more_steps_cannot_be_matched(teacher: str, tmp_path: Path) -> None:
    student(teacher, tmp_path / "two", 2)
    with pytest.raises(ValueError, match="takes 2 steps"):
        make_matched_student(teacher, str(tmp_path / "two" / "pipeline"), BRIEF, 2.0, tmp_path / "dmd")


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be one of fashion, fashion-micro, got 'huge'"):
        make_teacher("huge", BRIEF, tmp_path)


def test_presets_cover_what_ships() -> None:
    assert TEACHERS.keys() == SIZES.keys()
    assert STUDENTS.keys() == {1, 4}
