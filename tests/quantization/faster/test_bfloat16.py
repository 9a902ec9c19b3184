"""bfloat16: small error, half the bytes, everything else in float32, and bit-exact removal."""

import pytest
import torch
from small_pipelines import generate, small_pipeline
from small_transformers import FAMILIES, family_pipeline, family_sample

from diffusion_opt.evaluation import weight_bytes
from diffusion_opt.quantization import Bfloat16
from diffusion_opt.quantization.faster import bfloat16 as module

ANYWHERE = Bfloat16(require_fast=False)


def test_pictures_change_little_and_come_back_bit_for_bit():
    pipe = small_pipeline()
    before, bytes_before = generate(pipe), weight_bytes(pipe.transformer)
    ANYWHERE.apply(pipe)
    after = generate(pipe)
    assert after.dtype == torch.float32
    error = ((after - before).square().mean() / before.var()).sqrt()
    assert 0 < error < 0.05
    assert weight_bytes(pipe.transformer) == bytes_before / 2
    ANYWHERE.remove(pipe)
    assert torch.equal(generate(pipe), before)


def test_the_transformer_sees_bfloat16_and_the_scheduler_float32():
    pipe = small_pipeline()
    ANYWHERE.apply(pipe)
    seen = {}
    pipe.transformer.proj_out.register_forward_hook(lambda m, a, out: seen.update(inside=out.dtype))
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda velocity, *a, **k: seen.update(velocity=velocity.dtype) or step(velocity, *a, **k)
    generate(pipe)
    assert seen == {"inside": torch.bfloat16, "velocity": torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_it(family):
    pipe = family_pipeline(family)
    before = family_sample(pipe)
    ANYWHERE.apply(pipe)
    after = family_sample(pipe)
    assert torch.isfinite(after).all()
    assert ((after - before).square().mean() / before.var()).sqrt() < 0.1
    ANYWHERE.remove(pipe)
    assert torch.equal(family_sample(pipe), before)


def test_a_slow_machine_is_refused(monkeypatch):
    monkeypatch.setattr(module, "fast_here", lambda device: False)
    with pytest.raises(ValueError, match="no bfloat16 units"):
        Bfloat16().apply(small_pipeline())


def test_twice_or_not_at_all_is_refused():
    pipe = small_pipeline()
    with pytest.raises(ValueError, match="not applied"):
        ANYWHERE.remove(pipe)
    ANYWHERE.apply(pipe)
    with pytest.raises(ValueError, match=r"float32 transformer, but .* is torch\.bfloat16"):
        ANYWHERE.apply(pipe)
