"""A small pipeline for each test."""

import pytest
from quantization.pipelines import small_pipeline

from diffusion_opt.models import TinyFlux2Pipeline


@pytest.fixture
def pipe() -> TinyFlux2Pipeline:
    return small_pipeline()
