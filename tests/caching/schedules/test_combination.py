"""How passes become one velocity: read off the scheduler, for every formula that pipelines have."""

import pytest
import torch
from small_transformers import FAMILIES, family_pipeline, family_sample

from diffusion_opt.caching.schedules.combination import UNCONDITIONAL, combined, halves, heard, weights_of


def parts(number: int) -> dict[str, torch.Tensor]:
    names = ("cond", "uncond", "uncond_stg", "uncond_modality")[:number]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 5, 3, generator=generator) for name in names}


@pytest.mark.parametrize("weights", [(1.0,), (2.5, -1.5), (4.0, -1.0, -0.5, -1.5)])
def test_the_weights_of_a_formula_are_found_again(weights):
    given = parts(len(weights))
    moving = sum(weight * part for weight, part in zip(weights, given.values(), strict=True))
    found = weights_of(given, moving)
    assert list(found.values()) == pytest.approx(weights, abs=1e-6)
    torch.testing.assert_close(combined(found, given), moving, rtol=1e-5, atol=1e-5)


def test_a_doubled_batch_is_its_two_halves():
    whole = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    found = halves({"default": whole}, batch=2)
    assert list(found) == ["default" + UNCONDITIONAL, "default"]
    assert torch.equal(found["default"], whole[2:])


@pytest.mark.parametrize("moving", [None, torch.zeros(2, 4, 3)])
def test_where_the_scheduler_gets_something_else_the_prompt_stands_for_the_step(moving):
    assert weights_of(parts(3), moving) == {"cond": 1.0, "uncond": 0.0, "uncond_stg": 0.0}
    doubled = halves({"default": torch.ones(4, 5, 3)}, batch=2)
    assert weights_of(doubled, moving) == {"default" + UNCONDITIONAL: 0.0, "default": 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_listening_changes_nothing_and_hears_each_step_once(family):
    pipe = family_pipeline(family, blocks=2)
    alone, kind = family_sample(pipe, steps=3), type(pipe.scheduler)
    with heard(pipe.scheduler) as moving:
        assert torch.equal(family_sample(pipe, steps=3), alone)
    assert len(moving) == 3 and moving[0].shape[0] == 2
    assert type(pipe.scheduler) is kind and not hasattr(pipe.scheduler, "_heard")
