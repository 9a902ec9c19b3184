"""Block formats through modelopt's door for other backends: the same bits as its packed tensors, and a gradient."""

import warnings

import pytest
import torch

from diffusion_opt.quantization import FORMATS
from diffusion_opt.quantization.arithmetic.int4 import int4
from diffusion_opt.quantization.arithmetic.mx import mxfp8
from diffusion_opt.quantization.arithmetic.nvfp4 import nvfp4
from diffusion_opt.quantization.simulation import cpu_backend
from diffusion_opt.quantization.simulation.cpu_backend import round_blocks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

KINDS = {"nvfp4": ((2, 1), 16, (4, 3)), "mxfp8": ((4, 3), 32, (8, 0)), "int4": (4, 64, None)}
TWINS = {"nvfp4": nvfp4, "mxfp8": mxfp8, "int4": int4}


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()


def quantizer(name: str, amax: float | None = None) -> TensorQuantizer:
    """modelopt's quantizer of the inputs of a format, as `simulate` configures it."""
    cpu_backend.register()
    made = TensorQuantizer(QuantizerAttributeConfig(**FORMATS[name].input.attributes(weight=False)))
    if amax is not None:
        made.amax = torch.tensor(amax)
    return made


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(192,), (5, 128), (2, 3, 70)])
def test_equals_the_format_written_out(name, shape):
    x = numbers(*shape)
    assert torch.equal(round_blocks(x, *KINDS[name]), TWINS[name](x))
    half = x.bfloat16()
    assert torch.equal(round_blocks(half, *KINDS[name]), TWINS[name](half.float()).bfloat16())


def test_quantizers_of_modelopt_give_what_its_packed_tensors_hold():
    x = numbers(2, 7, 128)
    packed, scale, double = NVFP4QTensor.quantize(x.clone(), 16)
    theirs = packed.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
    assert torch.equal(quantizer("nvfp4", float(x.abs().amax()))(x), theirs)
    packed, scale = MXFP8QTensor.quantize(x.clone())
    assert torch.equal(quantizer("mxfp8")(x), packed.dequantize(scale=scale))
    assert torch.equal(quantizer("w4a4")(x), int4(x))


def test_a_block_beyond_the_calibrated_range_saturates():
    x = numbers(3, 64)
    x[1, 20] = 1000.0
    rounded = quantizer("nvfp4", 8.0)(x)
    assert float(rounded.max()) == 8.0
    assert torch.equal(rounded, nvfp4(x, torch.tensor(8.0)))


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_the_identity(name):
    x = numbers(4, 80).requires_grad_()
    weights = numbers(4, 80)
    (round_blocks(x, *KINDS[name]) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize("name", KINDS)
def test_zeros_stay_zeros(name):
    assert torch.equal(round_blocks(torch.zeros(2, 33), *KINDS[name]), torch.zeros(2, 33))


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match=r"no block format of num_bits=\(2, 1\), blocks of 32 and scale_bits=\(8, 0\)"):
        round_blocks(numbers(2, 32), (2, 1), 32, (8, 0))


def test_registering_twice_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu_backend.register()
        cpu_backend.register()
