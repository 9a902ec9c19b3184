"""A plan is made without weights, and says of a pass what counting a real one says."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.evaluation.cost import count
from diffusion_opt.subjects.plan import plan, skeleton


def counted(pipe, run) -> tuple[int, int]:
    """Multiply-accumulates of one pass of a real call, and its passes."""
    passes, given = [], []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, settings: (passes.append(1), given.append((arguments, settings)))[0], with_kwargs=True
    )
    run.generate(pipe, [0])
    hook.remove()
    with torch.no_grad():
        return count(lambda: pipe.transformer(*given[0][0], **given[0][1])).macs, len(passes)


@pytest.mark.parametrize("name", ["flux2-klein", "wan", "ltx2-cfg", "sd3"])
def test_a_plan_without_weights_counts_what_a_real_pass_counts(name, tmp_path: Path):
    pipe, run = tiny_pipeline(name), tiny_run(name, 3, batch_size=1)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    made = skeleton(tmp_path)
    assert all(p.is_meta for p in made.transformer.parameters())
    found = plan(made, run, torch.bfloat16)
    macs, passes = counted(pipe, run)
    assert found.first.macs == macs
    assert found.passes(3, 1) == passes
    assert found.parameters["transformer"] == sum(p.numel() for p in pipe.transformer.parameters())
    assert found.weight_bytes["transformer"] == 2 * found.parameters["transformer"]
    largest = max(torch.tensor(shape).prod().item() for shape in found.first.shapes.values())
    assert found.first.activation_bytes > 2 * largest
    assert "set_timesteps" not in vars(made.scheduler)


def test_activations_grow_with_the_picture(tmp_path: Path):
    tiny_pipeline("flux2-klein").save_pretrained(tmp_path)
    runs = (tiny_run("flux2-klein", 2, height=side, width=side, batch_size=1) for side in (64, 128))
    small, large = (plan(skeleton(tmp_path), run, torch.float32).first for run in runs)
    assert large.macs > 3 * small.macs and large.activation_bytes > 3 * small.activation_bytes


def test_a_unet_is_refused_with_the_reason(tmp_path: Path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="denoises with a UNet"):
        plan(skeleton(tmp_path), tiny_run("sdxl", 2), torch.float32)
