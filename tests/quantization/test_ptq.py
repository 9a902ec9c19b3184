"""PTQ as a technique: calibrated on the pipeline, on just the chosen layers, agreeing with ours, and undone exactly."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from quantization.pipelines import anatomy, classes, error, generate
from torch import nn

from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.quantization import FORMATS, PTQ, DynamicInt8, choose, quantization_report, simulated_formats
from diffusion_opt.quantization.faster.int8_cpu import DynamicInt8Linear, weight_scales
from diffusion_opt.subjects import Run

QUICK = PTQ(run=classes(batch_size=3, num_inference_steps=3, guidance_scale=2.0), samples=6)


def test_quantizes_the_chosen_layers_quietly_and_changes_the_output_little(pipe, capfd):
    exact, before = generate(pipe), weight_bytes(pipe.transformer)
    assert QUICK.apply(pipe) is pipe
    assert capfd.readouterr().out == ""
    chosen = [choice.name for choice in choose(pipe.transformer) if choice.quantized]
    report = quantization_report(pipe)
    assert list(report.quantized) == chosen
    assert {layer.kind for layer in report.layers} == {"float", "simulated"}
    assert 0 < error(generate(pipe), exact) < 0.1
    assert report.weight_bytes == report.float32_bytes  # simulated: no byte is saved
    assert weight_bytes(pipe.transformer) >= before


def test_remove_restores_classes_attributes_and_bits(pipe):
    exact, before = generate(pipe), anatomy(pipe.transformer)
    QUICK.apply(pipe)
    assert anatomy(pipe.transformer) != before
    QUICK.remove(pipe)
    assert anatomy(pipe.transformer) == before
    assert torch.equal(generate(pipe), exact)
    with pytest.raises(ValueError, match="they were not applied"):
        QUICK.remove(pipe)
    QUICK.apply(pipe)  # and again


@torch.no_grad()
def test_one_layer_has_the_scales_of_the_real_kernel(pipe):
    layer = pipe.transformer.transformer_blocks[0].ff.linear_in
    scales, integers = weight_scales(layer.weight), DynamicInt8Linear(layer).dequantized_weight()
    QUICK.apply(pipe)
    torch.testing.assert_close(layer.weight_quantizer.amax.flatten() / 127, scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.weight_quantizer(layer.weight), integers, rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 5, 32)
    step = layer.input_quantizer.amax / 127
    q_x = (x / step).round().clamp(-127, 127) * step
    torch.testing.assert_close(layer(x), nn.functional.linear(q_x, integers), rtol=1e-4, atol=1e-5)


def test_each_layer_can_have_its_own_format(pipe):
    exact = generate(pipe)
    layers = {
        "single_transformer_blocks.0.attn.to_out": "nvfp4",
        "transformer_blocks.0.ff.linear_in": "int8",
        "proj_out": "fp8",  # named, so the policy is not asked
    }
    technique = dataclasses.replace(QUICK, layers=layers)
    technique.apply(pipe)
    assert simulated_formats(pipe.transformer) == {name: FORMATS[format] for name, format in layers.items()}
    assert set(quantization_report(pipe).quantized) == set(layers)
    assert technique.describe().startswith("FP8+INT8+NVFP4 linears")
    technique.remove(pipe)
    assert torch.equal(generate(pipe), exact)


def test_ends_of_the_stack_and_the_rank_can_be_chosen(pipe):
    technique = dataclasses.replace(QUICK, format="nvfp4_svdquant", rank=3, first_blocks=1, last_blocks=1)
    technique.apply(pipe)
    formats = simulated_formats(pipe.transformer)
    assert all(name.startswith("single_transformer_blocks.0.") for name in formats)
    assert {format.rank for format in formats.values()} == {3}
    layer = pipe.transformer.single_transformer_blocks[0].attn.to_out
    assert layer.weight_quantizer.svdquant_lora_a.shape == (3, layer.in_features)


def test_a_format_with_fewer_bits_costs_more(pipe):
    exact, errors = generate(pipe), {}
    for name in ("int8", "fp8", "nvfp4"):
        technique = dataclasses.replace(QUICK, format=name)
        technique.apply(pipe)
        errors[name] = error(generate(pipe), exact)
        technique.remove(pipe)
    assert 0 < errors["int8"] < errors["fp8"] < errors["nvfp4"] < 0.2


def test_a_failed_calibration_leaves_the_pipeline_as_it_was(pipe):
    before = anatomy(pipe.transformer)
    with pytest.raises(ValueError, match="unknown prompt 'zebra'"):
        dataclasses.replace(QUICK, run=Run(("zebra",)), samples=1).apply(pipe)
    assert anatomy(pipe.transformer) == before


def test_what_it_cannot_do_it_says(pipe, monkeypatch):
    with pytest.raises(ValueError, match="no plain linear layer left"):
        dataclasses.replace(QUICK, skip=(".*",)).apply(pipe)
    DynamicInt8(min_width=0).apply(pipe)
    with pytest.raises(ValueError, match="no plain linear layer left"):
        QUICK.apply(pipe)
    DynamicInt8(min_width=0).remove(pipe)
    QUICK.apply(pipe)
    for technique in (QUICK, DynamicInt8(min_width=0)):
        with pytest.raises(ValueError, match=r"is a QuantLinear, not a plain nn\.Linear"):
            technique.apply(pipe)
    QUICK.remove(pipe)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(ImportError, match="onnx is not installed: pip install onnx"):
        QUICK.apply(pipe)


@pytest.mark.wrong_shapes
def test_settings_round_trip_and_bad_ones_are_refused(pipe):
    for technique in (
        PTQ("fp8", run=Run(("bag", "coat"), guidance_scale=2.0), skip=("proj_out",), ranges="mse"),
        PTQ(layers={"proj_out": "nvfp4"}),
    ):
        assert PTQ(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
        assert "simulated" in technique.describe()
    for change, message in [
        ({"format": "int3"}, "one of int8, .*, got 'int3'"),
        ({"layers": {"proj_out": "int3"}}, "one of int8, .*, got 'int3'"),
        ({"layers": {"proj_out": "int8"}, "first_blocks": 1}, "layers names every layer itself"),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"run": {"prompts": ["bag"], "height": 0}}, "height must be at least 1, got 0"),
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"ranges": "entropy"}, "ranges must be one of max, percentile, mse, got 'entropy'"),
        ({"percentile": 0.0}, r"percentile must lie in \(0, 100\], got 0.0"),
        ({"run": {"prompts": []}}, "at least one prompt, got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            PTQ(**change)
    with pytest.raises(ValueError, match="rank=4 is for a format with a low-rank branch"):
        PTQ("int8", rank=4).apply(pipe)


def test_a_pipeline_without_classes_needs_prompts(pipe):
    pipe.class_embedder = None
    with pytest.raises(ValueError, match=r"TinyFlux2Pipeline has no classes of its own to ask for: give prompts"):
        PTQ().apply(pipe)


def test_a_few_step_student_is_calibrated_at_its_own_steps(shipped):
    pipe = shipped("fashion-4step")
    times = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    exact = generate(pipe, steps=4, guidance=1.0, batch=10)
    own = list(times)
    technique = PTQ("fp8", samples=20)
    technique.apply(pipe)
    assert times[len(own) :] == 2 * own
    handle.remove()
    assert 0 < error(generate(pipe, steps=4, guidance=1.0, batch=10), exact) < 0.3
    technique.remove(pipe)
    assert torch.equal(generate(pipe, steps=4, guidance=1.0, batch=10), exact)


def test_the_shipped_teacher_stands_int8_and_simulation_agrees_with_the_real_kernel(shipped):
    pipe = shipped("fashion")
    exact = generate(pipe, steps=6, batch=5)
    technique = PTQ(run=classes(batch_size=5, num_inference_steps=4, guidance_scale=2.0), samples=10)
    technique.apply(pipe)
    simulated = error(generate(pipe, steps=6, batch=5), exact)
    technique.remove(pipe)
    assert torch.equal(generate(pipe, steps=6, batch=5), exact)
    DynamicInt8().apply(pipe)
    real = error(generate(pipe, steps=6, batch=5), exact)
    assert simulated < 0.05
    assert 1 / 3 < simulated / real < 3
