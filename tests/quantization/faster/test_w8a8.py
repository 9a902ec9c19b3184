"""W8A8: torch's own 8-bit products, on any shape and type, undone without a trace; its folder opens as it should."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.pipelines import anatomy, error, generate, small_pipeline
from torch import nn

import diffusion_opt
from diffusion_opt.evaluation import count
from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.quantization import (
    W8A8,
    DynamicInt8,
    DynamicInt8Linear,
    W8A8Linear,
    choose,
    quantization_report,
    save_quantized,
)
from diffusion_opt.quantization.faster import w8a8
from diffusion_opt.quantization.faster.w8a8 import TYPES
from diffusion_opt.quantization.packed import network
from diffusion_opt.recipes.ladder import fitted, obstacle
from diffusion_opt.recipes.recipe import Recipe

KINDS = tuple(TYPES)


def anywhere(numbers: str, **settings: object) -> W8A8:
    return W8A8(numbers, require_fast=False, **settings)


@torch.no_grad()
def test_int8_is_torchs_integer_product():
    linear, x = nn.Linear(48, 32), torch.randn(20, 48)
    s_x, s_w = x.abs().amax(1) / 127, linear.weight.abs().amax(1) / 127
    q_x, q_w = (x / s_x[:, None]).round().to(torch.int8), (linear.weight / s_w[:, None]).round().to(torch.int8)
    expected = torch._int_mm(q_x, q_w.T.contiguous()).float() * s_x[:, None] * s_w + linear.bias
    torch.testing.assert_close(W8A8Linear(linear, "int8")(x), expected)


@torch.no_grad()
def test_e4m3_is_torchs_scaled_product():
    linear, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48)
    s_x, s_w = x.abs().amax(1, keepdim=True) / 448, linear.weight.abs().amax(1, keepdim=True) / 448
    q_x, q_w = ((tensor / scale).to(torch.float8_e4m3fn) for tensor, scale in ((x, s_x), (linear.weight, s_w)))
    expected = torch._scaled_mm(q_x, q_w.T, s_x, s_w.T, out_dtype=torch.float32)
    torch.testing.assert_close(W8A8Linear(linear, "e4m3")(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("numbers", KINDS)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(-6, 6), st.integers(0, 10**6))
def test_the_error_keeps_its_bound(numbers, inputs, outputs, log_size, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * 2**log_size)
    x = torch.randn(3, inputs, generator=generator) * torch.rand(inputs, generator=generator) ** 4  # uneven columns
    layer = W8A8Linear(linear, numbers)

    def step(rows: torch.Tensor) -> torch.Tensor:
        """Half a step of each number: of its row's scale in int8; 2^-4 of itself, or of the smallest normal, in e4m3"""
        largest = rows.abs().amax(1, keepdim=True)
        return largest / 254 if numbers == "int8" else torch.maximum(rows.abs() / 16, largest / 448 * 2**-10)

    assert bool(((linear.weight - layer.dequantized_weight()).abs() <= step(linear.weight) * (1 + 1e-5)).all())
    ones = torch.ones_like
    bound = (x.abs() @ (step(linear.weight) * ones(linear.weight)).T) + (
        (step(x) * ones(x)) @ layer.dequantized_weight().abs().T
    )
    assert bool(((layer(x) - linear(x)).abs() <= bound * (1 + 1e-4) + 1e-5).all())


@torch.no_grad()
@pytest.mark.parametrize("numbers", KINDS)
def test_shapes_types_and_tokens_that_do_not_meddle(numbers):
    layer = W8A8Linear(nn.Linear(32, 16), numbers)
    x = torch.randn(2, 3, 5, 32)
    out = layer(x)
    assert out.shape == (2, 3, 5, 16)
    assert torch.equal(layer(x[1, 2]), out[1, 2])  # each token has a scale of its own
    assert torch.equal(layer(x.transpose(0, 1)), out.transpose(0, 1))
    assert layer(x[:0]).shape == (0, 3, 5, 16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(torch.zeros(2, 32)), layer.bias.expand(2, 16))


@torch.no_grad()
@pytest.mark.parametrize("numbers", KINDS)
def test_casts_move_the_bias_and_nothing_else(numbers):
    layer = W8A8Linear(nn.Linear(32, 16), numbers)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.bias.dtype == torch.bfloat16 and cast.scales.dtype == torch.float32
    assert torch.equal(cast.codes.view(torch.uint8), layer.codes.view(torch.uint8))
    assert layer.to("meta").codes.device.type == "meta"


@torch.no_grad()
def test_weights_that_are_not_finite_are_refused():
    linear = nn.Linear(3, 2)
    linear.weight[0, 1] = float("inf")
    with pytest.raises(ValueError, match="weights must be finite, 1 of them are not"):
        W8A8Linear(linear, "int8")


@torch.no_grad()
@pytest.mark.parametrize("numbers", KINDS)
def test_work_is_counted_like_that_of_a_float_layer(numbers):
    linear, x = nn.Linear(32, 16), torch.randn(2, 3, 32)
    layer = W8A8Linear(linear, numbers)
    assert count(lambda: layer(x)).macs == count(lambda: linear(x)).macs == 6 * 32 * 16


@pytest.mark.parametrize("numbers", KINDS)
def test_apply_and_remove(pipe, numbers):
    exact, before, bytes_before = generate(pipe), anatomy(pipe.transformer), weight_bytes(pipe.transformer)
    chosen = [choice for choice in choose(pipe.transformer) if choice.quantized]
    technique = anywhere(numbers)
    assert technique.apply(pipe) is pipe
    assert 0 < error(generate(pipe), exact) < 0.1
    found = [name for name, module in pipe.transformer.named_modules() if isinstance(module, W8A8Linear)]
    assert found == [choice.name for choice in chosen] == list(quantization_report(pipe).quantized)
    saved = sum(3 * choice.layer.weight.numel() - 4 * choice.layer.out_features for choice in chosen)
    assert weight_bytes(pipe.transformer) == bytes_before - saved
    with pytest.raises(ValueError, match=re.escape(f"has 8-bit linears already, {found[0]}")):
        DynamicInt8(min_width=0).apply(pipe)
    technique.remove(pipe)
    assert anatomy(pipe.transformer) == before
    assert torch.equal(generate(pipe), exact)
    with pytest.raises(ValueError, match="cannot remove W8A8 from this pipeline: it was not applied"):
        technique.remove(pipe)


def test_layers_that_the_kernel_cannot_take_stay(pipe):
    block = pipe.transformer.transformer_blocks[0].attn
    block.to_out[0] = nn.Linear(block.to_out[0].in_features, 24)
    anywhere("int8").apply(pipe)
    assert type(block.to_out[0]) is nn.Linear and isinstance(block.to_q, W8A8Linear)
    with pytest.raises(
        ValueError, match=r"min_width=64 and skip=\(\) and features in multiples of 16: the widest .* 32"
    ):
        anywhere("int8", min_width=64).apply(small_pipeline())


def test_where_it_is_not_faster_it_says_so(pipe, monkeypatch):
    with pytest.raises(ValueError, match=r"kernel for CUDA GPUs, on cpu .*; W8A8\(require_fast=False\)"):
        W8A8().apply(pipe)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    gpu = torch.device("cuda")
    assert w8a8.obstacle("int8", gpu) is None
    assert w8a8.obstacle("e4m3", gpu) == "e4m3 matrix units come with compute capability 8.9, this GPU has 8.6"
    assert obstacle(Recipe((W8A8("e4m3"),)), gpu) == w8a8.obstacle("e4m3", gpu)
    assert obstacle(Recipe((W8A8("e4m3", require_fast=False),)), gpu) is None


def test_the_ladder_takes_the_kernel_of_its_device():
    recipe = Recipe((DynamicInt8(skip=("proj_out",)),))
    assert fitted(recipe, torch.device("cuda")) == Recipe((W8A8("int8", skip=("proj_out",)),))
    assert fitted(recipe, torch.device("cpu")) == recipe
    assert obstacle(recipe, torch.device("mps")) is not None


def test_settings_are_checked_and_round_trip_through_json():
    technique = W8A8("e4m3", 64, (r".*\.ff\..*",), reversible=False)
    assert W8A8(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
    with pytest.raises(ValueError, match="numbers must be one of int8, e4m3, got 'fp8'"):
        W8A8("fp8")
    with pytest.raises(ValueError, match="got -1"):
        W8A8(min_width=-1)


@pytest.mark.parametrize("numbers", KINDS)
def test_a_saved_pipeline_opens_to_the_fast_layer_of_the_machine(numbers, pipe, tmp_path, monkeypatch):
    anywhere(numbers).apply(pipe)
    with pytest.raises(ValueError, match=r"saved with save_quantized\(pipe, folder\)"):
        pipe.save_pretrained(tmp_path / "refused")
    save_quantized(pipe, tmp_path / "saved")
    opened = diffusion_opt.load(tmp_path / "saved")
    kind = DynamicInt8Linear if numbers == "int8" else W8A8Linear
    layer, origin = (p.transformer.transformer_blocks[0].attn.to_q for p in (opened, pipe))
    assert isinstance(layer, kind)
    assert torch.equal(layer.dequantized_weight(), origin.dequantized_weight())
    if numbers == "e4m3":
        assert torch.equal(generate(opened), generate(pipe))
    else:
        assert error(generate(opened), generate(pipe)) < 0.1
    # What a GPU would hold, before it is moved there.
    entry = network._describe(origin)
    tensors = {name: tensor for name, tensor in origin.stored().items() if tensor is not None}
    about = {key: value for key, value in entry.items() if key != "kind"}
    there = network._eight_bit(entry["kind"], about, tensors, cpu_kernel=False)
    x = torch.randn(3, origin.in_features)
    assert isinstance(there, W8A8Linear) and torch.equal(there(x), origin(x))


def test_the_shipped_teacher_keeps_its_images(shipped):
    pipe = shipped("fashion")
    exact = generate(pipe, steps=4, batch=10)
    errors = {}
    for numbers in KINDS:
        technique = anywhere(numbers)
        technique.apply(pipe)
        errors[numbers] = error(generate(pipe, steps=4, batch=10), exact)
        technique.remove(pipe)
    assert errors["int8"] < errors["e4m3"] < 0.05


@pytest.mark.compiled
@torch.no_grad()
@pytest.mark.parametrize("numbers", KINDS)
def test_it_compiles_in_one_graph(numbers):
    layer, x = W8A8Linear(nn.Linear(32, 16), numbers), torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
