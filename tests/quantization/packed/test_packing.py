"""Packed linears: the simulation's output bit for bit, the bytes the format promises, and no quiet way to lose them."""

import copy
from dataclasses import replace

import pytest
import torch
from quantization.pipelines import chosen, classes, generate, simulated, small_pipeline

from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.quantization import (
    FORMATS,
    PTQ,
    DynamicInt8,
    PackedLinear,
    pack,
    quantization_report,
)

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_is_that_of_the_simulation_and_the_bytes_are_those_of_the_format(name):
    pipe, format = simulated(name), FORMATS[name]
    expected = generate(pipe)
    assert pack(pipe) is pipe
    assert torch.equal(generate(pipe), expected)
    layers = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, PackedLinear)}
    assert list(layers) == chosen(name)
    for layer in layers.values():
        ranges = 0 if layer.input_amax is None else 32
        bias = 0 if layer.bias is None else 32 * layer.out_features
        wanted = format.weight_bits(layer.out_features, layer.in_features) + ranges + bias
        assert 8 * weight_bytes(layer) == wanted


def test_nothing_of_the_float_weights_or_of_modelopt_is_left():
    pipe = simulated("nvfp4")
    float_bytes = weight_bytes(small_pipeline().transformer)
    technique = PTQ("nvfp4")
    pack(pipe)
    assert weight_bytes(pipe.transformer) < 0.6 * float_bytes
    assert not [name for name, module in pipe.transformer.named_modules() if "modelopt" in type(module).__module__]
    with pytest.raises(ValueError, match="were not applied"):
        technique.remove(pipe)
    report = quantization_report(pipe)
    assert {layer.kind for layer in report.layers} == {"float", "packed"}
    packed = sum(weight_bytes(module) for module in pipe.transformer.modules() if isinstance(module, PackedLinear))
    assert packed == sum(layer.weight_bytes for layer in report.layers if layer.kind == "packed")


def test_formats_can_be_mixed():
    names = chosen("nvfp4")[:4]
    formats = dict(zip(names, ["int8", "nvfp4_svdquant", "w4a8", "mxfp8"], strict=True))
    pipe = PTQ(layers=formats, run=classes(num_inference_steps=1), samples=2).apply(small_pipeline())
    expected = generate(pipe)
    pack(pipe)
    assert torch.equal(generate(pipe), expected)
    assert {name: pipe.transformer.get_submodule(name).format.name for name in names} == formats


def test_a_range_that_was_cut_saturates_alike():
    pipe = simulated("int8", ranges="percentile", percentile=90.0)
    expected = generate(pipe)
    assert torch.equal(generate(pack(pipe)), expected)


def test_casting_reaches_what_is_computed_with_and_no_code():
    pipe = pack(simulated("nvfp4_svdquant"))
    layer = pipe.transformer.get_submodule(LAYER)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.bfloat16()
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == (torch.bfloat16 if name == "smoothing" else before[name].dtype)
        if name != "smoothing":
            assert torch.equal(tensor.float(), before[name].float())
    assert layer(torch.zeros(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_compute_alike_and_plain_saving_is_refused(tmp_path):
    pipe = pack(simulated())
    assert torch.equal(generate(copy.deepcopy(pipe)), generate(pipe))
    with pytest.raises(ValueError, match=r"save_quantized\(pipe, folder\)"):
        pipe.save_pretrained(tmp_path)


def test_pipelines_without_simulation_are_refused(pipe):
    for prepare in (lambda: pipe, lambda: DynamicInt8(min_width=0).apply(pipe), lambda: pack(simulated())):
        with pytest.raises(ValueError, match="nothing to pack"):
            pack(prepare())


def test_tensors_that_do_not_fit_the_format_are_named():
    layer = pack(simulated()).transformer.get_submodule(LAYER)
    tensors = dict(layer.named_buffers())
    for change, message in (
        (
            {"codes": tensors["codes"][:-1]},
            r"codes of a layer in nvfp4 must be torch.uint8 \(32, 16\), got .*\(31, 16\)",
        ),
        ({"scales": tensors["scales"].float()}, r"must be torch.float8_e4m3fn \(32, 2\), got torch.float32"),
        ({"up": torch.ones(32, 8)}, "up is no part of a layer in nvfp4"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedLinear(layer.format, tensors | change)
    with pytest.raises(ValueError, match="input_amax is missing of a layer in nvfp4"):
        PackedLinear(layer.format, {name: t for name, t in tensors.items() if name != "input_amax"})
    assert PackedLinear(replace(layer.format, name="another"), tensors).format.name == "another"
