"""A tiny teacher on disk, with weights that do something, for recipes to act on."""

from pathlib import Path

import pytest
from small_pipelines import small_pipeline

from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, load

CONFIG = TinyFlux2Config(image_size=16, num_heads=2, head_dim=32, text_dim=8)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    small_pipeline(CONFIG, 1, 0.05, default_steps=6, default_guidance=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    small_pipeline(CONFIG, 2, 0.05, default_steps=1, is_distilled=True).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(teacher_folder: Path) -> TinyFlux2Pipeline:
    pipe = load(teacher_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
