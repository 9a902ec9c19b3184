"""Bytes of packed weights: those of modelopt's and of diffusers' own packed tensors, and exact to decode."""

import pytest
import torch
from diffusers.quantizers.bfl.utils import dequantize_nvfp4
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

from diffusion_opt.quantization import FORMATS, Numbers
from diffusion_opt.quantization.arithmetic.fp8 import fp8
from diffusion_opt.quantization.arithmetic.int4 import int4
from diffusion_opt.quantization.arithmetic.int8 import int8
from diffusion_opt.quantization.arithmetic.mx import mxfp8
from diffusion_opt.quantization.arithmetic.nvfp4 import nvfp4
from diffusion_opt.quantization.packed.encoding import decode, encode, layout

NVFP4, MXFP8, INT4, INT8, FP8 = (FORMATS[n].weight for n in ("nvfp4", "mxfp8", "w4a4", "int8", "fp8"))


def channels(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(1, keepdim=True)


def blocks_of_64(x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 64))
    return padded.unflatten(1, (-1, 64)).abs().amax(-1)


ROUNDINGS = {
    "nvfp4": (NVFP4, lambda x: x.abs().amax(), nvfp4),
    "mxfp8": (MXFP8, lambda x: None, mxfp8),
    "int4": (INT4, blocks_of_64, int4),
    "int8": (INT8, channels, lambda x: int8(x, channels(x))),
    "fp8": (FP8, lambda x: x.abs().amax(), lambda x: fp8(x, x.abs().amax())),
}


@pytest.mark.parametrize("name", ROUNDINGS)
@given(st.integers(1, 5), st.integers(1, 70), st.floats(-30, 30), st.integers(0, 10**6))
def test_decoding_gives_the_rounded_numbers_bit_for_bit(name, rows, columns, log_size, seed):
    numbers, ranges, rounding = ROUNDINGS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 2.0**log_size
    x[torch.rand(rows, columns, generator=generator) < 0.1] *= 100  # outliers
    x[0] = 0
    encoded = encode(x, numbers, ranges(x))
    assert torch.equal(decode(encoded, numbers, columns), rounding(x))
    held = {key: (tuple(t.shape), t.dtype) for key, t in encoded._asdict().items() if t is not None}
    assert held == layout(numbers, rows, columns)
    spare = 4 * rows * (columns % 2) if numbers.bits == 4 else 0  # a row of halves fills its last byte
    assert 8 * sum(t.nbytes for t in encoded if t is not None) == numbers.total_bits(rows, columns) + spare


def test_nvfp4_has_the_bytes_of_modelopt_and_the_values_of_diffusers():
    x = torch.randn(6, 64)
    packed, scales, unit = NVFP4QTensor.quantize(x.clone(), 16)
    encoded = encode(x, NVFP4, x.abs().amax())
    assert torch.equal(encoded.codes, packed._quantized_data)
    assert torch.equal(encoded.scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(encoded.range, unit)
    assert torch.equal(decode(encoded, NVFP4, 64), dequantize_nvfp4(*encoded))


def test_mxfp8_has_the_bytes_of_modelopt():
    x = torch.randn(6, 64) * torch.logspace(-6, 6, 6)[:, None]
    packed, scales = MXFP8QTensor.quantize(x)
    encoded = encode(x, MXFP8)
    assert torch.equal(encoded.codes.view(torch.uint8), packed._quantized_data.view(torch.uint8))
    assert torch.equal(encoded.scales, scales)


def test_numbers_without_a_packed_form_are_refused():
    with pytest.raises(ValueError, match=r"no packed form of Numbers\(num_bits=6"):
        encode(torch.ones(2, 2), Numbers(6), torch.tensor(1.0))
