"""Dynamic INT8: equal to its formula, inside its error bound, honest about bytes, and undone without a trace."""

import copy
import dataclasses
import gc
import json
import pickle
import re
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.pipelines import anatomy, error, generate, small_pipeline
from torch import nn

from diffusion_opt.evaluation import count
from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.models import SIZES, build_pipeline
from diffusion_opt.quantization import DynamicInt8, DynamicInt8Linear, choose, quantization_report
from diffusion_opt.quantization.faster import int8_cpu
from diffusion_opt.quantization.faster.int8_cpu import MIN_WIDTH, kernel_here, weight_scales

ALL = DynamicInt8(min_width=0)
KERNELS = ["portable", *(["vnni"] if kernel_here()[0] == "vnni" else [])]  # all that this CPU can run


def activation_grid(x: torch.Tensor, kernel: str) -> tuple[float, int]:
    """Scale and zero point of activations whose range is that of the tensor and includes 0: 7 bits, or 8 with VNNI."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / (255 if kernel == "vnni" else 127), 6.1e-5)  # the portable kernel goes no lower
    return scale, round(-low / scale)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_the_integer_formula(bias, kernel):
    linear = nn.Linear(7, 5, bias=bias)
    x = torch.randn(2, 3, 7)
    q_w = (linear.weight / weight_scales(linear.weight)[:, None]).round()
    scale, zero = activation_grid(x, kernel)
    q_x = ((x / scale).round() + zero).clamp(0, 255 if kernel == "vnni" else 127) - zero
    expected = (q_x @ q_w.T) * scale * weight_scales(linear.weight)
    if bias:
        expected = expected + linear.bias
    layer = DynamicInt8Linear(linear, kernel)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.integers(), q_w.to(torch.int8))
    again = DynamicInt8Linear.from_integers(layer.integers(), layer.scales, layer.bias, kernel)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_layouts_and_empty_batches(kernel):
    layer, x = DynamicInt8Linear(nn.Linear(8, 5), kernel), torch.randn(2, 3, 8)
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))  # the range is that of the whole tensor
    assert torch.equal(layer(torch.randn(3, 16)[:, ::2].copy_(x[0])), layer(x[0]))
    assert layer(x[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_work_is_counted_like_that_of_a_float_layer(kernel):
    linear, x = nn.Linear(7, 5), torch.randn(2, 3, 7)
    layer = DynamicInt8Linear(linear, kernel)
    assert count(lambda: layer(x)).macs == count(lambda: linear(x)).macs == 6 * 7 * 5


def test_the_kernel_is_chosen_by_the_processor_and_says_why(monkeypatch):
    for has, kernel, why in (
        ({"architecture": "x86_64", "avx2": True}, "portable", r"\(x86_64\) has none of avx_vnni"),
        ({"architecture": "x86_64", "avx512_vnni": True}, "vnni", "avx512_vnni"),
        ({"architecture": "aarch64"}, "portable", "aarch64"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        chosen, reason = int8_cpu.kernel_here()
        assert chosen == kernel and re.search(why, reason)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": True})
    assert int8_cpu.kernel_here() == ("portable", "this build of torch has no oneDNN")


@torch.no_grad()
def test_inputs_that_are_not_finite_are_refused():
    if kernel_here()[0] != "vnni":
        pytest.skip("the portable kernel does its own range check")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="inputs must be finite"):
            DynamicInt8Linear(nn.Linear(3, 2))(torch.tensor([[1.0, bad, 2.0]]))


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(-8, 8), st.integers(0, 10**6))
def test_the_error_keeps_its_bound(kernel, inputs, outputs, log_size, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * 2**log_size)
    x = torch.randn(3, inputs, generator=generator) * torch.rand(inputs, generator=generator) ** 4  # uneven columns
    layer = DynamicInt8Linear(linear, kernel)
    weight = layer.dequantized_weight()
    scales = weight_scales(linear.weight)
    assert bool(((linear.weight - weight).abs() <= scales[:, None] / 2 * (1 + 1e-5)).all())
    bound = scales / 2 * x.abs().sum(1, keepdim=True) + activation_grid(x, kernel)[0] / 2 * weight.abs().sum(1)
    difference = (layer(x) - linear(x)).abs()
    assert bool((difference <= bound * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_adversarial_weights(kernel):
    linear = nn.Linear(4, 3)
    linear.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1e4, 1, 1, 1], [1e-30, 0, 0, 0]]))
    layer = DynamicInt8Linear(linear, kernel)
    assert layer.dequantized_weight()[0].eq(0).all()  # an all-zero channel stays zero
    assert layer.dequantized_weight()[1].tolist() == [pytest.approx(1e4), 0, 0, 0]  # one outlier costs its channel
    torch.testing.assert_close(layer(torch.zeros(2, 4)), linear.bias.expand(2, 3))
    linear.weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of them are not"):
        DynamicInt8Linear(linear)


@torch.no_grad()
def test_wrong_types_and_devices_are_refused(pipe):
    layer = DynamicInt8Linear(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"float32 inputs on a CPU, got torch.bfloat16 on cpu"):
        layer(torch.zeros(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"float32 weights on a CPU, got torch.float16 on cpu"):
        DynamicInt8Linear(nn.Linear(4, 3).half())
    with pytest.raises(ValueError, match=r"float32 weights on a CPU, got torch.float32 on meta"):
        DynamicInt8Linear(nn.Linear(4, 3, device="meta"))
    before = anatomy(pipe.transformer)
    pipe.transformer.single_transformer_blocks[1].attn.to_out.bfloat16()
    with pytest.raises(ValueError, match=r"torch.bfloat16"):
        ALL.apply(pipe)
    assert anatomy(pipe.transformer) == before


def test_remove_restores_the_very_modules(pipe):
    exact, before = generate(pipe), anatomy(pipe.transformer)
    assert ALL.apply(pipe) is pipe
    quantized = generate(pipe)
    assert 0 < error(quantized, exact) < 0.1
    ALL.remove(pipe)
    assert anatomy(pipe.transformer) == before
    assert torch.equal(generate(pipe), exact)
    with pytest.raises(ValueError, match="it was not applied"):
        ALL.remove(pipe)


def test_just_the_chosen_layers_are_replaced(pipe):
    chosen = [choice.name for choice in choose(pipe.transformer) if choice.quantized]
    kept = {c.name: c.layer for c in choose(pipe.transformer) if not c.quantized}
    ALL.apply(pipe)
    found = [name for name, module in pipe.transformer.named_modules() if isinstance(module, DynamicInt8Linear)]
    assert found == chosen
    assert all(pipe.transformer.get_submodule(name) is layer for name, layer in kept.items())
    report = quantization_report(pipe)
    assert list(report.quantized) == chosen
    assert set(report.kept) == set(kept)


def test_bytes_are_those_of_the_integers(pipe):
    before = weight_bytes(pipe.transformer)
    chosen = [choice.layer for choice in choose(pipe.transformer) if choice.quantized]
    saved = sum(3 * layer.weight.numel() - 8 * layer.out_features for layer in chosen)
    reported = quantization_report(pipe).weight_bytes
    ALL.apply(pipe)
    assert weight_bytes(pipe.transformer) == before - saved
    report = quantization_report(pipe)
    assert report.weight_bytes == reported - saved
    assert report.float32_bytes == reported
    assert f"16 of 25 linear layers quantized, {report.weight_bytes:,} bytes instead of {reported:,}" in str(report)


def test_without_reversal_the_float_weights_are_gone(pipe):
    weight = weakref.ref(pipe.transformer.transformer_blocks[0].attn.to_q.weight)
    technique = DynamicInt8(min_width=0, reversible=False)
    technique.apply(pipe)
    gc.collect()
    assert weight() is None
    with pytest.raises(ValueError, match="applied with reversible=False"):
        technique.remove(pipe)


def test_too_narrow_models_and_second_applications_are_refused(pipe):
    with pytest.raises(ValueError, match=r"min_width=192 and skip=\(\): the widest layer has 128; min_width=0"):
        DynamicInt8(min_width=192).apply(build_pipeline(SIZES["fashion-micro"]))
    with pytest.raises(ValueError, match=rf"min_width={MIN_WIDTH[kernel_here()[0]]} .* the widest layer has 32"):
        DynamicInt8().apply(pipe)
    with pytest.raises(ValueError, match="nothing to quantize"):
        DynamicInt8(min_width=0, skip=(".*",)).apply(pipe)
    ALL.apply(pipe)
    with pytest.raises(ValueError, match="has 8-bit linears already"):
        ALL.apply(pipe)


def test_settings_round_trip_through_json():
    technique = DynamicInt8(min_width=64, skip=(r".*\.ff\..*",), reversible=False)
    assert DynamicInt8(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
    with pytest.raises(ValueError, match="got -1"):
        DynamicInt8(min_width=-1)
    with pytest.raises(
        ValueError, match=r"skip must be a list or tuple of strings, got 'proj_out'; write \('proj_out',"
    ):
        DynamicInt8(skip="proj_out")


def test_copies_compute_alike_and_saving_is_refused(pipe, tmp_path):
    ALL.apply(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(generate(twin), generate(pipe))
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(2, layer.in_features)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    ALL.remove(twin)
    assert torch.equal(generate(twin), generate(small_pipeline()))
    with pytest.raises(ValueError, match=r"saved with save_quantized\(pipe, folder\)"):
        pipe.save_pretrained(tmp_path)


def test_the_shipped_teacher_keeps_its_images_at_a_fraction_of_the_bytes(shipped):
    pipe = shipped("fashion")
    exact, before = generate(pipe, steps=10, batch=10), weight_bytes(pipe.transformer)
    DynamicInt8().apply(pipe)
    assert error(generate(pipe, steps=10, batch=10), exact) < 0.05
    report = quantization_report(pipe)
    assert len(report.quantized) == 16
    assert weight_bytes(pipe.transformer) < 0.5 * before
    DynamicInt8().remove(pipe)
    assert torch.equal(generate(pipe, steps=10, batch=10), exact)
