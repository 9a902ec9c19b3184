"""Two times in a stock transformer: nothing changes at first, and the pipeline tells each pass how far to jump."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from small_pipelines import fill, generate, small_pipeline

from diffusion_opt.flow import ClassCondition, euler, sampling_times
from diffusion_opt.models import flow_map_transformer, load, velocity_model
from diffusion_opt.models.flow_map import scheduled_jumps


@pytest.fixture
def flow_map():
    pipe = small_pipeline()
    pipe.transformer = flow_map_transformer(pipe.transformer)
    pipe.register_to_config(flow_map=True)
    return pipe


def test_a_fresh_flow_map_is_its_teacher_bit_for_bit(flow_map):
    assert type(flow_map.transformer) is Flux2Transformer2DModel
    assert torch.equal(generate(flow_map, guidance=1.0), generate(small_pipeline(), guidance=1.0))


def test_the_pipeline_is_euler_along_the_jumps(flow_map):
    fill(flow_map.transformer, std=0.3, seed=1)
    steps, labels = 3, torch.arange(3)
    model = velocity_model(flow_map)
    latents = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    x = model.unpack(latents.flatten(2).transpose(1, 2), (4, 4))
    times = sampling_times(steps).float()
    for t, r in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        at, to = torch.full((3,), t), torch.full((3,), r)
        x = x + (r - t) * model(x, at, ClassCondition(labels, 10), r=to)
    found = flow_map(
        labels.tolist(), num_inference_steps=steps, guidance_scale=1.0, latents=latents, output_type="pt"
    ).images
    torch.testing.assert_close(found, ((x + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)
    blind = euler(model, model.unpack(latents.flatten(2).transpose(1, 2), (4, 4)), times, ClassCondition(labels, 10))
    assert (blind - x).abs().max() > 1e-3, "the length of the jump must matter, or this test shows nothing"


def test_a_flow_map_survives_saving(flow_map, tmp_path):
    fill(flow_map.transformer, std=0.3, seed=1)
    flow_map.save_pretrained(tmp_path, safe_serialization=True)
    assert torch.equal(generate(load(tmp_path), guidance=1.0), generate(flow_map, guidance=1.0))


def test_a_taken_slot_is_refused(flow_map):
    with pytest.raises(ValueError, match="slot for the second time is taken"):
        flow_map_transformer(flow_map.transformer)


def test_a_time_outside_the_schedule_is_refused(flow_map):
    flow_map.scheduler.set_timesteps(2)
    tokens, text = torch.zeros(1, 4, 16), torch.zeros(1, 1, 24)
    with (
        scheduled_jumps(flow_map.transformer, flow_map.scheduler),
        pytest.raises(ValueError, match=r"time 0\.3 is not"),
    ):
        flow_map.transformer(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=torch.tensor([0.3]),
            img_ids=torch.zeros(4, 4),
            txt_ids=torch.zeros(1, 4),
        )


def test_no_trace_is_left_on_the_transformer(flow_map):
    generate(flow_map, guidance=1.0)
    assert not flow_map.transformer._forward_pre_hooks
