"""A plan is made without weights, and says of a pass what counting a real one says."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.caching import anchor_bytes
from diffusion_opt.evaluation.cost import count
from diffusion_opt.models import block_stack
from diffusion_opt.subjects import denoisers
from diffusion_opt.subjects.plan import plan, skeleton


def real_passes(pipe, run) -> tuple[int, list[int]]:
    """Multiply-accumulates of the first pass of a real call, and how many passes each network makes."""
    given, networks = [], denoisers(pipe)
    hooks = [
        network.register_forward_pre_hook(lambda net, args, kwargs: given.append((net, args, kwargs)), with_kwargs=True)
        for network in networks.values()
    ]
    run.generate(pipe, [0])
    for hook in hooks:
        hook.remove()
    network, args, kwargs = given[0]
    with torch.no_grad():
        macs = count(lambda: network(*args, **kwargs)).macs
    return macs, [sum(net is network for net, _, _ in given) for network in networks.values()]


@pytest.mark.parametrize(
    "name",
    ["flux2-klein", "wan2.2", "ltx2", "sd3", "ltx-i2v", "qwen-image", "z-image"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("wan-i2v", "ltx2-i2v", "flux2-klein-kv", "hunyuan-video", "pixart", "sana", "cogvideox", "flux")
    ],
)
def test_a_plan_without_weights_counts_what_a_real_call_counts(name, tmp_path: Path):
    pipe, run = tiny_pipeline(name), tiny_run(name, 3, batch_size=1)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    made = skeleton(tmp_path)
    assert all(p.is_meta for p in made.transformer.parameters())
    found = plan(made, run, torch.bfloat16)
    macs, passes = real_passes(pipe, run)
    assert found.first.macs == macs
    counted = [sum(one.count for one in found.passes if one.network == name) for name in denoisers(pipe)]
    assert counted == passes and found.num_passes == sum(passes) and found.macs >= found.num_passes * macs / 2
    assert found.parameters["transformer"] == sum(p.numel() for p in pipe.transformer.parameters())
    assert found.weight_bytes["transformer"] == 2 * found.parameters["transformer"]
    largest = max(torch.tensor(shape).prod().item() for shape in found.first.shapes.values())
    assert found.first.activation_bytes > largest
    assert type(made.scheduler) is type(pipe.scheduler) and "forward" not in vars(made.transformer)


def test_hunyuan_video_sorts_its_texts_without_weights(tmp_path: Path):
    """Its pipeline keeps the lengths of texts in attributes, which no folder has: 1,000 tokens here."""
    tiny_pipeline("hunyuan-video-1.5").save_pretrained(tmp_path)
    found = plan(skeleton(tmp_path), tiny_run("hunyuan-video-1.5", 3), torch.float32)
    assert found.num_passes == 6 and found.first.shapes["encoder_hidden_states"][1] == 1000


@pytest.mark.parametrize("name", ["ltx2-cfg", "wan"])
def test_anchors_are_those_of_the_step_cache(name, tmp_path: Path):
    pipe, run = tiny_pipeline(name), tiny_run(name, 3, batch_size=1)
    pipe.save_pretrained(tmp_path)
    found = plan(skeleton(tmp_path), run, torch.float32)
    seen = []
    handle = block_stack(pipe.transformer).blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    run.generate(pipe, [0])
    handle.remove()
    streams = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
    tokens = {stream: shape[1] for stream, shape in found.first.streams.items()}
    batch = len(streams[0])
    contexts = found.num_passes // found.steps
    assert sorted(tuple(shape) for shape in found.first.streams.values()) == sorted(tuple(x.shape) for x in streams)
    assert found.anchor_bytes == anchor_bytes(pipe.transformer, tokens, batch, num_anchors=1, num_contexts=contexts)


def test_activations_grow_with_the_picture(tmp_path: Path):
    tiny_pipeline("flux2-klein").save_pretrained(tmp_path)
    runs = (tiny_run("flux2-klein", 2, height=side, width=side, batch_size=1) for side in (64, 128))
    small, large = (plan(skeleton(tmp_path), run, torch.float32).first for run in runs)
    assert large.macs > 3 * small.macs and large.activation_bytes > 3 * small.activation_bytes


def test_a_unet_is_refused_with_the_reason(tmp_path: Path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="denoises with a UNet"):
        plan(skeleton(tmp_path), tiny_run("sdxl", 2), torch.float32)
