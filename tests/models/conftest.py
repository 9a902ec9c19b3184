"""A FLUX.2 of 60 thousand parameters whose output depends on all its inputs: weights that start at zero are filled."""

from collections.abc import Callable

import pytest
from small_pipelines import small_pipeline
from torch import nn

from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline

TINY = TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, num_single=1, text_dim=24)


@pytest.fixture(scope="session")
def make_pipe() -> Callable[..., TinyFlux2Pipeline]:
    def make(config: TinyFlux2Config = TINY, **settings: object) -> TinyFlux2Pipeline:
        return small_pipeline(config, std=0.1, **settings)

    return make


@pytest.fixture
def pipe(make_pipe) -> TinyFlux2Pipeline:
    return make_pipe()


@pytest.fixture
def count_calls() -> Callable[[nn.Module], list]:
    """Note the batch size of each forward of a module in the list returned."""

    def count(module: nn.Module) -> list[int]:
        calls = []
        module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(len(kwargs["timestep"])), with_kwargs=True
        )
        return calls

    return count
