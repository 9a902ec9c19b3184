"""Descriptions of stacks against what flows in each family's transformer while its pipeline generates."""

import inspect
from collections.abc import Iterator
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import networks, tiny_pipeline, tiny_run
from torch import nn

from diffusion_opt.models.block_stack import BlockStack, block_stack

PIPELINES = {  # and the module that reads what the stack made
    "flux": "norm_out",
    "flux-img2img": "norm_out",
    "qwen-image": "norm_out",
    "z-image": "all_final_layer.2-1",
    "pixart": "norm_out",
    "sana": "norm_out",
    "hunyuan-video": "norm_out",
    "hunyuan-video-1.5": "norm_out",
    "cogvideox": "norm_final",
    "flux2-klein-reference": "norm_out",
    "wan2.2-5b": "norm_out",
    "sd3": "norm_out",
    "ltx": "norm_out",
}


def parameters_of(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def first(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


class Watch:
    """What entered and left the blocks of a transformer in its last pass, and how it was called in each."""

    def __init__(self, transformer: nn.Module, tail: str) -> None:
        self.stack: BlockStack = block_stack(transformer)
        self.calls: list[dict] = []
        self.blocks: list[tuple[dict, object]] = []
        transformer.register_forward_pre_hook(self.called, with_kwargs=True)
        for block in self.stack.blocks:
            block.register_forward_hook(self.passed, with_kwargs=True)
        attention = next(
            getattr(self.stack.blocks[0], name)
            for name in ("attn", "attn1", "attention")
            if hasattr(self.stack.blocks[0], name)
        )
        attention.register_forward_pre_hook(lambda m, a, k: setattr(self, "modulated", first(a, k)), with_kwargs=True)
        transformer.get_submodule(tail).register_forward_pre_hook(lambda m, a: setattr(self, "read", a[0]))

    def called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.append(dict(zip(parameters_of(module), args, strict=False)) | kwargs)
        self.blocks = []

    def passed(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self.blocks.append((dict(zip(parameters_of(module), args, strict=False)) | kwargs, output))


def watched(name: str, steps: int = 3, **changes: object) -> tuple[DiffusionPipeline, Watch]:
    pipe = tiny_pipeline(name)
    watch = Watch(pipe.transformer, PIPELINES[name])
    run = replace(tiny_run(name, steps), **changes)
    run.generate(pipe, range(run.batch_size))
    return pipe, watch


@pytest.mark.parametrize("name", PIPELINES)
def test_the_description_is_what_flows(name):
    _, watch = watched(name)
    stack = watch.stack
    assert len(watch.blocks) == len(stack.blocks) == 4
    given = watch.blocks[0][0]
    start = stack.entering(given)
    assert {stream: tensor.shape[-1] for stream, tensor in start.items()} == stack.widths
    torch.testing.assert_close(stack.modulated(given), watch.modulated, rtol=0, atol=0)
    (end,) = stack.leaving(watch.blocks[-1][1], start).values()
    assert torch.equal(end.float(), watch.read.float())
    assert end.shape == start["hidden"].shape
    assert not torch.equal(end, start["hidden"])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_block_that_changes_nothing(name):
    """What is handed on has the form of the block's own output, and the streams that the block was given."""
    _, watch = watched(name, steps=2)
    start = watch.stack.entering(watch.blocks[0][0])
    for given, output in watch.blocks:
        handed_on = watch.stack.handed_on(given)
        assert isinstance(handed_on, tuple) == isinstance(output, tuple)
        (stream,) = watch.stack.leaving(handed_on, start).values()
        tensors = [value for value in given.values() if torch.is_tensor(value) and value.ndim == 3]
        assert any(stream.equal(value[:, -stream.shape[1] :]) for value in tensors)
        end = {"hidden": torch.randn_like(start["hidden"])}
        assert torch.equal(watch.stack.leaving(watch.stack.replaced(handed_on, end), start)["hidden"], end["hidden"])


@pytest.mark.parametrize("name", PIPELINES)
def test_times_and_samples_of_the_calls(name):
    pipe, watch = watched(name, steps=5)
    scheduler = pipe.scheduler
    times = list(dict.fromkeys(watch.stack.time_of(call) for call in watch.calls))
    assert len(times) == (4 if name == "flux-img2img" else 5)  # at strength .8 the first of five is left out
    expected = [float(t) / scheduler.config.num_train_timesteps for t in scheduler.timesteps[-len(times) :]]
    assert times == pytest.approx(expected, abs=1e-6)
    shapes = {tuple(watch.stack.sample(call).shape) for call in watch.calls}
    assert len(shapes) == 1


def test_samples_at_different_times_have_no_time():
    _, watch = watched("z-image", steps=1)
    call = watch.calls[0]
    assert watch.stack.time_of(call | {"t": torch.tensor([0.1, 0.2, 0.1, 0.1])}) is None
    assert watch.stack.result(([torch.ones(2, 3), torch.zeros(2, 3)],)).shape == (2, 2, 3)


def test_hunyuan_video_with_a_first_frame_of_its_own():
    """Image-to-video by token replacement modulates the given frame's tokens by the time 0."""
    transformer = networks.hunyuan_video(image_condition_type="token_replace")
    watch = Watch(transformer, "norm_out")
    with torch.no_grad():
        transformer(
            hidden_states=torch.randn(2, 4, 3, 4, 6),
            timestep=torch.tensor([700, 700]),
            encoder_hidden_states=torch.randn(2, 5, 16),
            encoder_attention_mask=torch.ones(2, 5),
            pooled_projections=torch.randn(2, 8),
            guidance=torch.tensor([4000.0, 4000.0]),
        )
    torch.testing.assert_close(watch.stack.modulated(watch.blocks[0][0]), watch.modulated, rtol=0, atol=0)


def test_qwen_image_with_given_pictures_at_time_zero():
    """Its editing model modulates the tokens of given pictures by the time 0."""
    transformer = networks.qwen_image(zero_cond_t=True)
    watch = Watch(transformer, "norm_out")
    with torch.no_grad():
        transformer(
            hidden_states=torch.randn(1, 10, 16),
            timestep=torch.tensor([0.7]),
            encoder_hidden_states=torch.randn(1, 5, 16),
            encoder_hidden_states_mask=torch.ones(1, 5),
            img_shapes=[[(1, 2, 3), (1, 2, 2)]],
        )
    torch.testing.assert_close(watch.stack.modulated(watch.blocks[0][0]), watch.modulated, rtol=0, atol=0)


def _refused() -> Iterator[tuple[nn.Module, str]]:
    heads = {"num_attention_heads": 2, "attention_head_dim": 32}
    with torch.device("meta"):
        yield diffusers.FluxTransformer2DModel(num_layers=0, num_single_layers=1, **heads), r"got 0 \+ 1"
        yield diffusers.HunyuanVideoTransformer3DModel(num_layers=0, num_single_layers=1, **heads), "a double block"
        yield diffusers.SanaTransformer2DModel(num_layers=1, guidance_embeds=True, **heads), "makes 1 to 4 steps"
        size = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12]}
        yield diffusers.ZImageTransformer2DModel(siglip_feat_dim=8, **size), "Z-Image-Omni"


def test_what_cannot_be_cut_is_refused():
    for transformer, reason in _refused():
        with pytest.raises(ValueError, match=reason):
            block_stack(transformer)
