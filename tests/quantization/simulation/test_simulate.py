"""Formats put on and taken off small transformers of every family: what is rounded, what is not, and the gradient."""

import copy
import warnings

import pytest
import torch
from quantization.pipelines import anatomy
from small_transformers import family_pass, small_transformer
from torch import Tensor, nn

from diffusion_opt.quantization import FORMATS, choose, restore, simulate, simulated_formats
from diffusion_opt.quantization.arithmetic.fp8 import fp8
from diffusion_opt.quantization.arithmetic.int4 import int4
from diffusion_opt.quantization.arithmetic.int8 import int8
from diffusion_opt.quantization.arithmetic.mx import mxfp8
from diffusion_opt.quantization.arithmetic.nvfp4 import nvfp4

FAMILIES = ("flux2", "ltx2", "wan", "sd3")


class Model:
    """A small transformer with three passes to calibrate on."""

    def __init__(self, family: str) -> None:
        self.transformer = small_transformer(family, blocks=2)
        self.passes = [family_pass(family, time, seed=seed) for seed, time in enumerate((1.0, 0.6, 0.2))]
        self.names = [choice.name for choice in choose(self.transformer) if choice.quantized]

    @torch.no_grad()
    def output(self) -> Tensor:
        return self.transformer(**self.passes[1])[0]

    def loop(self) -> None:
        for one in self.passes:
            self.transformer(**one)

    def simulate(self, name: str, **options: object) -> None:
        simulate(self.transformer, dict.fromkeys(self.names, FORMATS[name]), self.loop, **options)


@pytest.fixture
def flux2() -> Model:
    return Model("flux2")


def modelopts_modules(transformer: nn.Module) -> dict[str, str]:
    """Names and kinds of all modules that modelopt made or converted, quantizers apart."""
    return {
        name: type(module).__name__
        for name, module in transformer.named_modules()
        if type(module).__module__.startswith("modelopt") and not name.endswith("_quantizer")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_only_the_named_layers_and_they_all(family, name):
    model = Model(family)
    exact, before = model.output(), anatomy(model.transformer)
    model.simulate(name)
    # neither attention nor the inputs of LayerNorm nor Wan's Conv3d, all of which modelopt's presets would take
    assert modelopts_modules(model.transformer) == dict.fromkeys(model.names, "QuantLinear")
    error = (model.output() - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.3
    assert simulated_formats(model.transformer) == dict.fromkeys(model.names, FORMATS[name])
    restore(model.transformer)
    assert anatomy(model.transformer) == before
    assert torch.equal(model.output(), exact)
    assert simulated_formats(model.transformer) == {}


@pytest.mark.parametrize("name", FORMATS)
def test_backward_works_and_removal_is_exact(flux2, name):
    exact, before = flux2.output(), anatomy(flux2.transformer)
    flux2.simulate(name)
    flux2.transformer(**flux2.passes[0])[0].square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in flux2.transformer.parameters())
    twin = copy.deepcopy(flux2.transformer)
    with torch.no_grad():
        assert torch.equal(twin(**flux2.passes[1])[0], flux2.output())
    for transformer in (flux2.transformer, twin):
        restore(transformer)
        assert torch.equal(transformer(**flux2.passes[1])[0], exact)
    assert anatomy(flux2.transformer) == before
    with pytest.raises(ValueError, match="they were not applied"):
        restore(flux2.transformer)


@pytest.mark.parametrize("name", ["int8_smoothquant", "nvfp4_svdquant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_were_not_named_keep_their_weights_bit_for_bit(family, name):
    model = Model(family)
    before = {key: value.clone() for key, value in model.transformer.state_dict().items()}
    model.names = model.names[1:3]
    model.simulate(name)
    after = model.transformer.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {f"{layer}.weight" for layer in model.names}  # part of them moved to inputs or a branch


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_computes_what_the_format_written_out_computes(flux2, name):
    layer = flux2.transformer.transformer_blocks[0].ff.linear_out
    weight, x = layer.weight.clone(), torch.randn(2, 5, layer.in_features)
    flux2.simulate(name)
    out, amax = layer(x), layer.input_quantizer.amax
    branch = 0.0
    if name in ("int8_smoothquant", "nvfp4_svdquant"):
        scale = layer.input_quantizer.pre_quant_scale
        x, weight = x * scale, layer.weight
        if name == "nvfp4_svdquant":
            a, b = layer.weight_quantizer.svdquant_lora_a, layer.weight_quantizer.svdquant_lora_b
            assert torch.equal(a, a.bfloat16().float()) and b.shape == (layer.out_features, 4)
            branch = x @ a.T @ b.T
            torch.testing.assert_close((weight + b @ a) * scale, flux2_weight(), rtol=1e-4, atol=1e-6)
    rows, size = weight.abs().amax(1, keepdim=True), weight.abs().amax()
    tokens = x.abs().amax(-1, keepdim=True)
    rounded = {
        "int8": lambda: (int8(x, amax), int8(weight, rows)),
        "int8_per_token": lambda: (int8(x, tokens), int8(weight, rows)),
        "int8_smoothquant": lambda: (int8(x, amax), int8(weight, rows)),
        "fp8": lambda: (fp8(x, amax), fp8(weight, size)),
        "mxfp8": lambda: (mxfp8(x), mxfp8(weight)),
        "int4_weight_only": lambda: (x, int4(weight)),
        "w4a8": lambda: (fp8(x, amax), int4(weight)),
        "w4a4": lambda: (int4(x), int4(weight)),
        "nvfp4": lambda: (nvfp4(x, amax), nvfp4(weight)),
        "nvfp4_svdquant": lambda: (nvfp4(x, amax), nvfp4(weight)),
    }
    q_x, q_w = rounded[name]()
    torch.testing.assert_close(out, nn.functional.linear(q_x, q_w, layer.bias) + branch, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight_quantizer(weight), q_w)


def flux2_weight() -> Tensor:
    return small_transformer("flux2", blocks=2).transformer_blocks[0].ff.linear_out.weight


def test_mixed_formats_calibrate_each_for_itself(flux2):
    alone = {}
    formats = dict(zip(flux2.names, [FORMATS[name] for name in FORMATS], strict=False))
    for name, format in formats.items():
        simulate(flux2.transformer, {name: format}, flux2.loop)
        alone[name] = quantized_weight(flux2.transformer, name)
        restore(flux2.transformer)
    exact = flux2.output()
    simulate(flux2.transformer, formats, flux2.loop)
    assert simulated_formats(flux2.transformer) == formats
    for name in formats:  # algorithms of the other layers have not touched this one
        assert torch.equal(quantized_weight(flux2.transformer, name), alone[name])
    restore(flux2.transformer)
    assert torch.equal(flux2.output(), exact)


@torch.no_grad()
def quantized_weight(transformer: nn.Module, name: str) -> Tensor:
    layer = transformer.get_submodule(name)
    return layer.weight_quantizer(layer.weight)


def test_svdquant_beats_plain_nvfp4_on_weights_with_a_strong_direction(flux2):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in flux2.names:
            weight = flux2.transformer.get_submodule(name).weight
            left, right = (torch.randn(n, 1, generator=generator) for n in weight.shape)
            weight.mul_(0.2).add_(0.3 * weight.std() * left @ right.T)
    exact, errors = flux2.output(), {}
    for name in ("nvfp4", "nvfp4_svdquant"):
        flux2.simulate(name)
        errors[name] = float((flux2.output() - exact).norm())
        restore(flux2.transformer)
    assert errors["nvfp4_svdquant"] < errors["nvfp4"]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_ranges_of_inputs_can_be_smaller_than_the_largest_value(flux2, name):
    ranges = {}
    for how, options in {"max": {}, "percentile": {"percentile": 99.0}, "mse": {}}.items():
        flux2.simulate(name, ranges=how, **options)
        ranges[how] = torch.stack([flux2.transformer.get_submodule(n).input_quantizer.amax for n in flux2.names])
        assert bool(flux2.output().isfinite().all())
        restore(flux2.transformer)
    assert bool((ranges["percentile"] < ranges["max"]).all())
    assert bool((ranges["mse"] <= ranges["max"]).all())
    if name == "int8":
        assert bool((ranges["mse"] < ranges["max"]).any())
    with pytest.raises(ValueError, match="needs a format whose inputs have one fixed range, as int8 and fp8 have"):
        flux2.simulate("nvfp4", ranges="mse")


def test_what_cannot_be_quantized_says_why(flux2):
    before = anatomy(flux2.transformer)
    name, layer = flux2.names[0], flux2.transformer.get_submodule(flux2.names[0])
    for names, format, message in [
        ([], "int8", "nothing to quantize: no layer was named"),
        (["nowhere"], "int8", "'nowhere' is no linear layer; their names are like .*proj_out"),
        (["transformer_blocks.0"], "int8", "'transformer_blocks.0' is no linear layer"),
        (["proj_out"], "nvfp4_svdquant", r"proj_out is \(16, 32\): a branch of rank 20 would be all of it"),
    ]:
        chosen = FORMATS[format].with_rank(20) if FORMATS[format].rank else FORMATS[format]
        with pytest.raises(ValueError, match=message):
            simulate(flux2.transformer, dict.fromkeys(names, chosen), flux2.loop)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} has weights that are inf or NaN"):
        flux2.simulate("int8")
    assert anatomy(flux2.transformer) == before


def test_a_layer_that_saw_no_data_is_an_error_and_leaves_no_trace(flux2):
    before = anatomy(flux2.transformer)
    with pytest.raises(
        ValueError, match="saw 0 samples in calibration, and at least 1 are needed: is this layer used at all"
    ):
        simulate(flux2.transformer, dict.fromkeys(flux2.names, FORMATS["int8"]), lambda: None)
    assert anatomy(flux2.transformer) == before


def test_calibration_data_that_is_not_finite_is_an_error(flux2):
    flux2.passes[1]["hidden_states"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"attn\.to_q met inf or NaN in calibration"):
        flux2.simulate("int8")
    assert not modelopts_modules(flux2.transformer)


def test_it_says_nothing_on_the_way(flux2, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flux2.simulate("nvfp4_svdquant")
    seen = capfd.readouterr()
    assert seen.out == "" and seen.err == ""
