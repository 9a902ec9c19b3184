"""Simulated INT8 through modelopt: calibrated, on just the chosen layers, agreeing with ours, and undone exactly."""

import dataclasses
import importlib.util
import json
import warnings

import pytest
import torch
from quantization.pipelines import anatomy, error, generate
from torch import nn

from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.quantization import DynamicInt8, ModeloptPTQ, choose, quantization_report
from diffusion_opt.quantization.int8_cpu import DynamicInt8Linear, weight_scales
from diffusion_opt.quantization.modelopt_ptq import quant_config

QUICK = ModeloptPTQ(calibration_batches=2, batch_size=3, num_inference_steps=3, guidance_scale=2.0)


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
def test_one_layer_equals_the_formula_and_the_scales_of_the_real_kernel(pipe):
    layer = pipe.transformer.transformer_blocks[0].ff.linear_in
    scales, integers = weight_scales(layer.weight), DynamicInt8Linear(layer).dequantized_weight()
    QUICK.apply(pipe)
    torch.testing.assert_close(layer.weight_quantizer.amax.flatten() / 127, scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.weight_quantizer(layer.weight), integers, rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 5, 32)
    step = layer.input_quantizer.amax / 127
    q_x = (x / step).round().clamp(-127, 127) * step
    torch.testing.assert_close(layer(x), nn.functional.linear(q_x, integers), rtol=1e-4, atol=1e-5)


def test_calibration_sees_the_whole_trajectory(pipe):
    layer = pipe.transformer.single_transformer_blocks[1].attn.to_out
    largest = []
    handle = layer.register_forward_pre_hook(lambda m, args: largest.append(args[0].abs().max()))
    QUICK.apply(pipe)
    handle.remove()
    assert len(largest) >= 2 * 3 * 2  # batches, steps, guidance branches
    assert float(layer.input_quantizer.amax) == pytest.approx(float(torch.stack(largest).max()))


def test_calibration_takes_all_classes_in_turn_and_the_same_noise(pipe):
    asked = []
    labels = pipe.class_embedder.labels
    pipe.class_embedder.labels = lambda prompt: asked.append(prompt) or labels(prompt)
    technique = ModeloptPTQ(calibration_batches=3, batch_size=4, num_inference_steps=2)
    technique.apply(pipe)
    del pipe.class_embedder.labels
    names = list(pipe.class_embedder.config.class_names)
    assert [name for batch in asked for name in batch] == [*names, *names[:2]]
    layer = pipe.transformer.single_transformer_blocks[0].attn.to_out
    first = float(layer.input_quantizer.amax)
    technique.remove(pipe)
    technique.apply(pipe)
    assert float(layer.input_quantizer.amax) == first


def test_the_pipeline_keeps_its_progress_bar_settings(pipe):
    pipe.set_progress_bar_config(desc="mine", disable=True)
    QUICK.apply(pipe)
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


def test_a_failed_calibration_leaves_the_pipeline_as_it_was(pipe):
    before = anatomy(pipe.transformer)
    with pytest.raises(ValueError, match="unknown prompt 'zebra'"):
        dataclasses.replace(QUICK, prompts=("zebra",)).apply(pipe)
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


def test_the_formats_are_those_of_modelopts_own_preset():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    preset = {entry["quantizer_name"]: entry.get("cfg") for entry in mtq.INT8_DEFAULT_CFG["quant_cfg"]}
    ours = {entry["quantizer_name"]: entry.get("cfg") for entry in quant_config(["layer"], "int8")["quant_cfg"]}
    for kind in ("weight", "input"):
        theirs = preset[f"*{kind}_quantizer"]
        assert {key: theirs.get(key) for key in ("num_bits", "axis")} == ours[f"layer.{kind}_quantizer"]


@pytest.mark.wrong_shapes
def test_settings_round_trip_and_bad_ones_are_refused():
    technique = ModeloptPTQ(prompts=("bag", "coat"), skip=("proj_out",), guidance_scale=2.0)
    assert ModeloptPTQ(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
    assert "simulated" in technique.describe()
    for change, message in [
        ({"format": "int3"}, "one of int8, got 'int3'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"prompts": ()}, "prompts must not be empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModeloptPTQ(**change)


def test_a_pipeline_without_classes_needs_prompts(pipe):
    pipe.class_embedder = None
    with pytest.raises(ValueError, match=r"TinyFlux2Pipeline has no classes to calibrate on: give prompts"):
        QUICK.apply(pipe)


def test_the_shipped_teacher_stands_int8_and_simulation_agrees_with_the_real_kernel(shipped):
    pipe = shipped("fashion")
    exact = generate(pipe, steps=10, batch=10)
    technique = ModeloptPTQ(calibration_batches=2, num_inference_steps=6, guidance_scale=2.0)
    technique.apply(pipe)
    simulated = error(generate(pipe, steps=10, batch=10), exact)
    technique.remove(pipe)
    assert torch.equal(generate(pipe, steps=10, batch=10), exact)
    DynamicInt8().apply(pipe)
    real = error(generate(pipe, steps=10, batch=10), exact)
    assert simulated < 0.05
    assert 1 / 3 < simulated / real < 3
