"""A small pipeline for each test, and the shipped ones."""

from collections.abc import Callable

import pytest
from diffusers import DiffusionPipeline
from quantization.pipelines import small_pipeline

import diffusion_opt
from diffusion_opt.models import TinyFlux2Pipeline


@pytest.fixture
def pipe() -> TinyFlux2Pipeline:
    return small_pipeline()


@pytest.fixture(scope="session")
def shipped() -> Callable[[str], DiffusionPipeline]:
    """Opens a shipped model by name; a missing one fails the test."""

    def open_quietly(name: str) -> DiffusionPipeline:
        pipe = diffusion_opt.load(name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return open_quietly
