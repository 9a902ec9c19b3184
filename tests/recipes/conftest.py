"""A tiny teacher on disk, with weights that do something, for recipes to act on."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, build_pipeline, load

CONFIG = TinyFlux2Config(image_size=16, num_heads=2, head_dim=32, text_dim=8)


def tiny_pipeline(seed: int, default_steps: int, default_guidance: float, is_distilled: bool) -> TinyFlux2Pipeline:
    pipe = build_pipeline(CONFIG, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in pipe.transformer.parameters():
        if not parameter.any():  # modulation and output start at zero
            nn.init.normal_(parameter, std=0.05, generator=generator)
    pipe.register_to_config(default_steps=default_steps, default_guidance=default_guidance, is_distilled=is_distilled)
    return pipe


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny_pipeline(1, 6, 2.0, False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    tiny_pipeline(2, 1, 1.0, True).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(teacher_folder: Path) -> TinyFlux2Pipeline:
    pipe = load(teacher_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
