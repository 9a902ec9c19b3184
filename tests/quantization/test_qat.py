"""Training through roundings: gradients everywhere, less error than PTQ left, the same teacher, exact resumption."""

import copy
from pathlib import Path

import pytest
import torch
from quantization.pipelines import classes, generate, small_pipeline
from safetensors.torch import load_file

from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.quantization import PTQ
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention
from diffusion_opt.quantization.mixed.trajectory_points import squared_error, trajectory_points, velocity_error
from diffusion_opt.quantization.qat import QAT, SelfDistillation, apply_all, quantization_aware
from diffusion_opt.training import TrainConfig, train

QUICK = {"run": classes(batch_size=4), "samples": 4}
CONFIG = TrainConfig(steps=12, batch_size=16, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, log_every=1)
W4A4 = PTQ("w4a4", **QUICK)


def two_step_pipeline() -> TinyFlux2Pipeline:
    return small_pipeline(std=0.6, default_steps=2, default_guidance=1.0)


@pytest.fixture
def pipe() -> TinyFlux2Pipeline:
    return two_step_pipeline()


def held_out(pipe: TinyFlux2Pipeline):
    return trajectory_points(pipe, 16, torch.Generator().manual_seed(99))


@pytest.mark.parametrize("format", ["int8", "fp8", "w4a4", "nvfp4", "nvfp4_svdquant"])
def test_gradients_reach_all_weights(pipe, format):
    points = held_out(pipe)[:8]
    technique = PTQ(format, rank=2, **QUICK) if format == "nvfp4_svdquant" else PTQ(format, **QUICK)
    apply_all(pipe, [technique, LowPrecisionAttention("nvfp4")])
    squared_error(pipe.transformer, points).backward()
    grads = {name: parameter.grad for name, parameter in pipe.transformer.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize(
    ("techniques", "share"),
    [
        (W4A4, 0.98),
        (PTQ("nvfp4", **QUICK), 0.93),
        ((PTQ("int4_weight_only", **QUICK), LowPrecisionAttention("int8")), 0.8),
    ],
)
def test_a_few_steps_win_back_what_rounding_lost(pipe, techniques, share, tmp_path):
    points, start = held_out(pipe), copy.deepcopy(pipe.transformer.state_dict())
    seen = []

    def watched(teacher, number, generator):
        seen.append(teacher)
        labels = torch.randint(10, (number,), generator=generator).tolist()
        teacher(prompt=labels, generator=generator, output_type="latent")

    quantized = copy.deepcopy(pipe)
    apply_all(quantized, techniques if isinstance(techniques, tuple) else [techniques])
    before = velocity_error(quantized.transformer, points)
    assert quantization_aware(pipe, techniques, CONFIG, tmp_path, run=watched, progress=False) is pipe
    assert velocity_error(pipe.transformer, points) < share * before
    assert seen and all(teacher is seen[0] for teacher in seen) and seen[0] is not pipe
    teacher = seen[0].transformer.state_dict()
    assert teacher.keys() == start.keys() and all(torch.equal(teacher[name], start[name]) for name in start)
    assert not any(parameter.requires_grad for parameter in seen[0].transformer.parameters())


def test_it_ends_quantized_and_the_weights_are_the_average(pipe, tmp_path):
    float_images = generate(pipe, guidance=1.0)
    quantization_aware(pipe, W4A4, CONFIG, tmp_path, progress=False)
    images = generate(pipe, guidance=1.0)
    linear = pipe.transformer.transformer_blocks[0].ff.linear_in
    assert linear.weight_quantizer.is_enabled and not torch.equal(linear.weight_quantizer(linear.weight), linear.weight)
    average = load_file(tmp_path / "checkpoint" / "ema.safetensors")
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, average[name])
    W4A4.remove(pipe)
    assert not torch.equal(generate(pipe, guidance=1.0), images)  # off again: the trained weights, not the old ones
    assert not torch.equal(generate(pipe, guidance=1.0), float_images)


@pytest.mark.parametrize("format", ["int8", "nvfp4_svdquant"])
def test_a_run_in_two_parts_ends_with_the_same_bits(format, tmp_path):
    technique = PTQ(format, rank=2, **QUICK) if format == "nvfp4_svdquant" else PTQ(format, **QUICK)
    settings = {"batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "decay_fraction": 0.0, "ema_decay": 0.5}

    def run(steps: int, out: Path) -> TinyFlux2Pipeline:
        fresh = two_step_pipeline()
        return quantization_aware(fresh, technique, TrainConfig(steps=steps, **settings), out, progress=False)

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    parts = run(4, tmp_path / "parts")
    found, expected = parts.transformer.state_dict(), whole.transformer.state_dict()
    assert any("quantizer" in name for name in expected) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(generate(parts, guidance=1.0), generate(whole, guidance=1.0))


def test_the_learning_rate_follows_the_error_that_ptq_left(pipe, tmp_path):
    teacher, rates = copy.deepcopy(pipe), {}
    for format in ("int8", "w4a4"):
        technique = PTQ(format, **QUICK)
        technique.apply(pipe)
        method = SelfDistillation(pipe.transformer, teacher)
        look = trajectory_points(teacher, 8, torch.Generator().manual_seed(0))
        assert method.start_error == velocity_error(pipe.transformer, look)
        assert method.roles["student"].rate == method.start_error
        config = TrainConfig(steps=1, batch_size=2, learning_rate=0.1, warmup_steps=0, log_every=1)
        (line,) = train(method, config, tmp_path / format, progress=False).history
        assert line["learning_rate"] == pytest.approx(0.1 * method.start_error)
        technique.remove(pipe)
        rates[format] = line["learning_rate"]
    assert rates["int8"] < 0.5 * rates["w4a4"]


def test_a_rate_that_suits_four_bits_ruins_eight(pipe, tmp_path):
    points, teacher = held_out(pipe), copy.deepcopy(pipe)
    PTQ("int8", **QUICK).apply(pipe)
    start = copy.deepcopy(pipe.transformer.state_dict())
    before, after = velocity_error(pipe.transformer, points), {}
    for name, scale in (("rule", 1.0), ("four bits", 30.0)):
        pipe.transformer.load_state_dict(start)
        method = SelfDistillation(pipe.transformer, teacher)
        config = TrainConfig(steps=12, batch_size=16, learning_rate=scale * CONFIG.learning_rate, warmup_steps=2)
        pipe.transformer.load_state_dict(train(method, config, tmp_path / name, False).ema.state_dict())
        after[name] = velocity_error(pipe.transformer, points)
    assert after["rule"] < 1.1 * before and after["four bits"] > 1.5 * before


def test_each_batch_is_new_and_depends_on_its_generator_alone(pipe):
    W4A4.apply(pipe)
    method = SelfDistillation(pipe.transformer, two_step_pipeline())
    one, same, other = (method.points(torch.Generator().manual_seed(seed), 5) for seed in (1, 1, 2))
    assert len(one) == 5 and torch.equal(one.outputs[0], same.outputs[0])
    assert not torch.equal(one.outputs[0], other.outputs[0])
    assert len(set(method.points(torch.Generator().manual_seed(0), 64).arguments["timestep"].tolist())) == 2


def test_what_cannot_be_trained_is_refused_and_undone(pipe, tmp_path):
    images = generate(pipe, guidance=1.0)

    class Nothing:
        def apply(self, pipe):
            return pipe

        def remove(self, pipe):
            return None

    with pytest.raises(ValueError, match="which is nothing: quantize it first"):
        quantization_aware(pipe, Nothing(), CONFIG, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"keep_dense=\(1, 2\) must leave some"):
        quantization_aware(pipe, [W4A4, LowPrecisionAttention(keep_dense=(1, 2))], CONFIG, tmp_path, progress=False)
    assert torch.equal(generate(pipe, guidance=1.0), images)
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="has two transformers"):
        quantization_aware(pipe, W4A4, CONFIG, tmp_path, progress=False)


@pytest.mark.parametrize("change", ["model", "format"])
def test_the_folder_of_another_run_is_refused_with_both_names(change, pipe, tmp_path):
    quantization_aware(two_step_pipeline(), W4A4, CONFIG, tmp_path, progress=False)
    if change == "model":
        with torch.no_grad():  # in a block, where the embedders do not tell
            pipe.transformer.transformer_blocks[0].ff.linear_in.weight[0, 0] += 1
    technique = W4A4 if change == "model" else PTQ("nvfp4", **QUICK)
    images = generate(pipe, guidance=1.0)
    names = {"model": r"model=[0-9a-f]{16}, now [0-9a-f]{16}", "format": "format=w4a4, now nvfp4"}[change]
    with pytest.raises(ValueError, match=f"was trained with .*{names}"):
        quantization_aware(pipe, technique, CONFIG, tmp_path, progress=False)
    assert torch.equal(generate(pipe, guidance=1.0), images)


def test_the_default_budget_counts_cpu_time():
    assert (QAT.clock, QAT.minutes) == ("process", 2)
