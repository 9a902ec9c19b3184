"""Step caches on families beyond the first five, in diffusers' own full pipelines called by text.

What `test_families.py` asks of single transformers is asked here of whole pipelines: the residual that a skipped pass
uses is the predictor's, no bit changes where nothing is skipped, and sizes, batches and a removal leave no trace.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_pipeline, tiny_run
from torch import Tensor

from diffusion_opt.caching import (
    EasyCache,
    FirstBlockCache,
    FixedSchedule,
    GuidanceCache,
    MagCache,
    StepTable,
    TeaCache,
    calibrate_step_cache,
    guidance_cache_report,
    step_cache_report,
)
from diffusion_opt.models.block_stack import block_stack
from diffusion_opt.subjects import Run

STEPS = 6
TAILS = {"z-image": "all_final_layer.2-1", "cogvideox": "norm_final"}
NAMES = {  # of the passes of a step
    "flux": ("cond",),
    "qwen-image": ("cond", "uncond"),
    "z-image": ("default",),
    "pixart": ("default",),
    "sana": ("default",),
    "hunyuan-video": ("cond",),
    "hunyuan-video-1.5": ("pred_cond", "pred_uncond"),
    "cogvideox": ("cond_uncond",),
}


def opened(name: str) -> tuple[DiffusionPipeline, Run]:
    return tiny_pipeline(name), tiny_run(name, STEPS)


def sample(pipe: DiffusionPipeline, run: Run) -> Tensor:
    return run.generate(pipe, range(run.batch_size))


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def count_blocks(pipe: DiffusionPipeline) -> list[int]:
    """Indices of the blocks in the order in which they run from now on."""
    ran: list[int] = []
    for index, block in enumerate(block_stack(pipe.transformer).blocks):
        attention = next(getattr(block, name) for name in ("attn", "attn1", "attention") if hasattr(block, name))
        attention.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


@pytest.mark.parametrize("name", NAMES)
def test_in_its_pipeline(name):
    pipe, run = opened(name)
    dense = sample(pipe, run)
    TeaCache(0.0).apply(pipe)
    assert torch.equal(sample(pipe, run), dense)
    TeaCache(0.0).remove(pipe)
    technique = FixedSchedule((True, True, False, True, False, True))
    technique.apply(pipe)
    ran = count_blocks(pipe)
    cached = sample(pipe, run)
    assert ran == [*range(4)] * (4 * len(NAMES[name]))
    report = step_cache_report(pipe)
    assert report.computed == dict.fromkeys(NAMES[name], 4)
    assert report.skipped == dict.fromkeys(NAMES[name], 2)
    assert 0 < error(cached, dense) < 0.3
    assert torch.equal(sample(pipe, run), cached)
    technique.remove(pipe)
    assert torch.equal(sample(pipe, run), dense)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_pass_is_the_stack_input_plus_the_forecast(name):
    """Against what the tail read, with the line through the last two residuals drawn by hand."""
    pipe, run = opened(name)
    FixedSchedule((True, True, False, True, True, True)).apply(pipe)
    stack = block_stack(pipe.transformer)
    entered, read, times = [], [], []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(
            stack.time_of(kwargs if "t" in kwargs or "timestep" in kwargs else {"x": args[0], "t": args[1]})
        ),
        with_kwargs=True,
    )
    stack.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    pipe.transformer.get_submodule(TAILS.get(name, "norm_out")).register_forward_pre_hook(
        lambda module, args: read.append(args[0])
    )
    sample(pipe, run)
    each = len(NAMES[name])
    for one in range(each):
        before, last, skipped = (read[i * each + one] - entered[i * each + one] for i in range(3))
        t = [times[i * each + one] for i in range(3)]
        line = last + (last - before) * (t[2] - t[1]) / (t[1] - t[0])
        scale = float(line.abs().max())
        torch.testing.assert_close(skipped, line, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_another_size_batch_and_number_of_steps_in_between(name):
    """One cache serves them all, and what it makes of the first call does not depend on what came between."""
    pipe, run = opened(name)
    FixedSchedule((True, True, False, True, False, True)).apply(pipe)
    first = sample(pipe, run)
    larger = replace(run, height=2 * run.height)
    assert sample(pipe, larger).numel() == 2 * first.numel()
    assert step_cache_report(pipe).skipped == dict.fromkeys(NAMES[name], 2)
    pair = [0, 1] if run.batch_size == 1 else [0]
    assert len(run.generate(pipe, pair)) == len(pair)
    assert step_cache_report(pipe).skipped == dict.fromkeys(NAMES[name], 2)
    assert torch.equal(sample(pipe, run), first)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_generation_leaves_nothing(name):
    pipe, run = opened(name)
    FixedSchedule((True, True, False, True, False, True)).apply(pipe)
    expected = sample(pipe, run)
    other = replace(run, prompts=run.prompts[::-1])
    with interrupted(pipe, after=3 * len(NAMES[name])), pytest.raises(KeyboardInterrupt):
        sample(pipe, other)
    assert torch.equal(sample(pipe, run), expected)


class interrupted:
    """Inside, the transformer's pass number `after` raises KeyboardInterrupt."""

    def __init__(self, pipe: DiffusionPipeline, after: int) -> None:
        self.transformer, self.after, self.passes = pipe.transformer, after, 0

    def __enter__(self) -> None:
        self.handle = self.transformer.register_forward_pre_hook(self.count)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def count(self, *_: object) -> None:
        self.passes += 1
        if self.passes >= self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_skips_and_repeats_itself(name, tmp_path):
    pipe, run = opened(name)
    dense = sample(pipe, run)
    found = calibrate_step_cache(pipe, run)
    path = tmp_path / "calibration.json"
    found.save(path)
    threshold = 0.9 * sum(found.step_table)
    for technique in (
        TeaCache(threshold, curve=str(path)),
        MagCache(9.0, str(path)),
        StepTable(threshold, str(path)),
        FirstBlockCache(50.0),
        EasyCache(50.0),
    ):
        technique.apply(pipe)
        cached = sample(pipe, run)
        assert step_cache_report(pipe).total_skipped > 0, technique
        assert torch.equal(sample(pipe, run), cached), technique
        assert cached.isfinite().all()
        technique.remove(pipe)
    assert torch.equal(sample(pipe, run), dense)


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video-1.5", "cogvideox", "sana"])
def test_guidance_can_be_forecast_in_two_passes_and_in_one_doubled_batch(name):
    pipe, run = opened(name)
    dense = sample(pipe, run)
    for technique, spares in ((GuidanceCache(1), False), (GuidanceCache(2), True)):
        technique.apply(pipe)
        cached = sample(pipe, run)
        skipped = guidance_cache_report(pipe).skipped
        technique.remove(pipe)
        assert skipped[NAMES[name][0]] == 0
        assert (sum(skipped.values()) > 0) == spares
        assert torch.equal(cached, dense) != spares
        assert error(cached, dense) < 0.1
    assert torch.equal(sample(pipe, run), dense)


def test_guidance_that_cannot_be_told_is_left_alone_and_named():
    pipe, run = opened("pixart")
    dense = sample(pipe, run)
    GuidanceCache(2).apply(pipe)
    assert torch.equal(sample(pipe, run), dense)
    with pytest.warns(UserWarning, match="or batched and the pipeline does not tell"):
        sample(pipe, run)  # this pipeline tells nobody that a generation has ended
    with pytest.raises(ValueError, match="returns its samples in a list"):
        GuidanceCache(2).apply(tiny_pipeline("z-image"))
