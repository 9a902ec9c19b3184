"""What calibration shows to a quantizer, and ranges that are chosen from histograms of it."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from quantization.pipelines import classes
from torch import nn

from diffusion_opt.quantization import PTQ
from diffusion_opt.quantization.arithmetic.int8 import int8
from diffusion_opt.quantization.simulation.calibration import run_trajectories
from diffusion_opt.quantization.simulation.input_ranges import NUM_BINS, InputHistograms

QUICK = PTQ(run=classes(batch_size=3, num_inference_steps=3, guidance_scale=2.0), samples=6)


def passes(pipe, samples: int = 12, **settings: object) -> list[tuple[float, str, int]]:
    """Time, branch and batch size of each pass of calibration."""
    seen = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        context = pipe.transformer._cache_context if hasattr(pipe.transformer, "_cache_context") else ""
        seen.append((float(kwargs["timestep"][0]), str(context), len(kwargs["hidden_states"])))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    given = {"batch_size": 4, "num_inference_steps": 4, "guidance_scale": 2.0}
    run_trajectories(pipe, classes(**{**given, **settings}), samples)
    handle.remove()
    return seen


def test_times_of_the_batches_interleave(pipe):
    times = [time for time, _, _ in passes(pipe)][::2]  # two branches at each step
    wanted = [1 - Fraction(k, n) for n in (4, 5, 6) for k in range(n)]
    assert times == pytest.approx([float(time) for time in wanted], abs=1e-3)
    assert len({round(time, 3) for time in times}) > 10


def test_without_a_number_of_steps_the_pipelines_own_are_run(pipe):
    pipe.register_to_config(default_steps=2)
    seen = passes(pipe, num_inference_steps=None, samples=8)
    assert [time for time, _, _ in seen] == pytest.approx([1, 1, 0.5, 0.5] * 2, abs=1e-3)


def test_both_guidance_branches_are_seen_unless_there_is_one(pipe):
    assert len(passes(pipe)) == 2 * len(passes(pipe, guidance_scale=1.0))


def test_all_classes_take_turns_and_the_noise_is_the_same_each_time(pipe):
    asked = []
    labels = pipe.class_embedder.labels
    pipe.class_embedder.labels = lambda prompt: asked.append(prompt) or labels(prompt)
    technique = PTQ(run=classes(batch_size=4, num_inference_steps=2), samples=12)
    technique.apply(pipe)
    del pipe.class_embedder.labels
    names = list(pipe.class_embedder.config.class_names)
    assert [name for batch in asked for name in batch] == [*names, *names[:2]]
    layer = pipe.transformer.single_transformer_blocks[0].attn.to_out
    first = float(layer.input_quantizer.amax)
    technique.remove(pipe)
    technique.apply(pipe)
    assert float(layer.input_quantizer.amax) == first
    technique.remove(pipe)
    dataclasses.replace(technique, run=dataclasses.replace(technique.run, seed=1)).apply(pipe)
    assert float(layer.input_quantizer.amax) != first


def test_the_range_is_the_largest_value_of_the_whole_trajectory(pipe):
    layer = pipe.transformer.single_transformer_blocks[1].attn.to_out
    largest = []
    handle = layer.register_forward_pre_hook(lambda m, args: largest.append(args[0].abs().max()))
    QUICK.apply(pipe)
    handle.remove()
    assert len(largest) == (3 + 4) * 2  # steps of both batches, guidance branches
    assert float(layer.input_quantizer.amax) == pytest.approx(float(torch.stack(largest).max()))


def test_one_bar_if_asked_and_the_pipelines_own_settings_stay(pipe, capfd):
    pipe.set_progress_bar_config(desc="mine", disable=True)
    QUICK.apply(pipe)
    assert capfd.readouterr().err == ""
    QUICK.remove(pipe)
    dataclasses.replace(QUICK, progress=True).apply(pipe)
    shown = capfd.readouterr().err
    assert "calibrating: 100%" in shown and "2/2" in shown and "mine" not in shown
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


@pytest.fixture
def histograms() -> InputHistograms:
    """Of one layer that saw 10 000 values spread evenly over [-1, 1] and a single -8."""
    model = nn.Sequential(nn.Linear(2, 2))
    made = InputHistograms({"0": 8.0})
    with made.watching(model):
        model(torch.linspace(-1, 1, 10000).view(-1, 2))
        model(torch.tensor([0.0, -8.0]))
    model(torch.full((2,), 5.0))  # outside: not counted
    return made


@pytest.mark.parametrize("share", [10.0, 50.0, 99.0])
def test_percentile_is_that_of_what_was_seen(histograms, share):
    assert histograms.percentile("0", share) == pytest.approx(share / 100, abs=2 * 8 / NUM_BINS)
    assert histograms.percentile("0", 100.0) == 8.0


def test_least_error_cuts_an_outlier_where_steps_are_coarse_and_keeps_it_where_they_are_fine(histograms):
    def rounded(bits: int):
        return lambda x, amax: int8(x, torch.tensor(amax), bits)

    assert histograms.least_error("0", rounded(3)) < 2
    assert histograms.least_error("0", rounded(12)) > 7
