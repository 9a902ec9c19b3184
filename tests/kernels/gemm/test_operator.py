"""Quantized linear layers by their reference: torch's integer product, error bounds, and each part of the epilogue."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_opt.kernels.gemm.operator import (
    QuantizedRows,
    quantize_rows,
    quantize_rows_op,
    quantized_linear,
    quantized_linear_op,
)
from diffusion_opt.kernels.gemm.oracle import quantized_product

B, L, K, N = 2, 5, 24, 8
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def dequantized(rows: QuantizedRows) -> Tensor:
    return rows.values.double() * rows.scales.double()[..., None]


def layer(kind: str, outputs: int = N) -> tuple[QuantizedRows, QuantizedRows, Tensor]:
    x, weight = torch.randn(B, L, K), torch.randn(outputs, K)
    return quantize_rows(x, TYPES[kind]), quantize_rows(weight, TYPES[kind]), torch.randn(outputs)


@given(st.integers(1, 6), st.integers(1, 30), st.floats(-6, 6), st.integers(0, 10**6))
def test_rows_are_rounded_within_half_a_step(rows, columns, log_size, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2**log_size
    q = quantize_rows(x, torch.int8)
    assert bool(((dequantized(q) - x).abs() <= q.scales[:, None].double() / 2 * (1 + 1e-6)).all())
    assert int(q.values.abs().max()) == 127
    q = quantize_rows(x, torch.float8_e4m3fn)
    # 3 bits of mantissa: 1/16 of a number, or of the smallest normal number
    assert bool(((dequantized(q) - x).abs() <= x.abs() / 16 + q.scales[:, None] * 2**-10 * (1 + 1e-6)).all())
    assert float(q.values.float().abs().max()) == 448


def test_a_row_of_zeros_and_leading_axes():
    x = torch.randn(2, 3, 4)
    x[1, 2] = 0
    q = quantize_rows(x, torch.int8)
    assert q.values.shape == (2, 3, 4) and q.scales.shape == (2, 3)
    assert float(q.scales[1, 2]) == 1 and not q.values[1, 2].any()


def test_integer_sums_are_those_of_torch():
    x, weight, _ = layer("int8")
    sums = torch._int_mm(x.values.reshape(-1, K), weight.values.mT.contiguous())
    expected = sums.float() * x.scales.reshape(-1, 1) * weight.scales
    got = quantized_product(x.values.reshape(-1, K), x.scales.reshape(-1), weight.values, weight.scales)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_plain_product_is_that_of_what_the_codes_stand_for(kind):
    x, weight, bias = layer(kind)
    out = quantized_linear(x, weight, bias, torch.float32)
    torch.testing.assert_close(out, (dequantized(x) @ dequantized(weight).mT + bias).float())


@pytest.mark.parametrize("kind", TYPES)
def test_it_is_near_the_layer_it_replaces(kind):
    x, weight, bias = torch.randn(B, 64, 256), torch.randn(128, 256), torch.randn(128)
    q = [quantize_rows(tensor, TYPES[kind]) for tensor in (x, weight)]
    out, exact = quantized_linear(*q, bias, torch.float32), F.linear(x, weight, bias)
    error = float((out - exact).norm() / exact.norm())
    assert error < {"int8": 0.015, "fp8": 0.05}[kind]


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("gate_rows", [0, 1, L])
def test_the_epilogue_in_its_order(activation, gate_rows):
    x, weight, bias = layer("int8")
    channels = N // 2 if activation == "swiglu" else N
    gate = torch.randn(B, gate_rows, channels) if gate_rows else None
    residual = torch.randn(B, L, channels)
    out = quantized_linear(x, weight, bias, torch.float32, activation=activation, gate=gate, residual=residual)
    z = (dequantized(x) @ dequantized(weight).mT + bias).float()
    if activation == "swiglu":
        z = F.silu(z[..., :channels]) * z[..., channels:]  # Flux2SwiGLU
    elif activation == "gelu_tanh":
        z = F.gelu(z, approximate="tanh")
    torch.testing.assert_close(out, residual + (z if gate is None else gate * z))


def test_swiglu_is_that_of_flux2():
    from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU

    x, weight, _ = layer("fp8")
    out = quantized_linear(x, weight, None, torch.float32, activation="swiglu")
    torch.testing.assert_close(out, Flux2SwiGLU()(quantized_linear(x, weight, None, torch.float32)))


@pytest.mark.parametrize("kind", TYPES)
def test_registration(kind):
    x, weight, bias = layer(kind)
    tensors = (x.values, x.scales, weight.values, weight.scales, bias, torch.randn(B, 1, 4), torch.randn(B, L, 4))
    checks = {"int8": ("test_schema", "test_faketensor"), "fp8": ("test_faketensor",)}[kind]  # e4m3 cannot be compared
    torch.library.opcheck(quantized_linear_op, (*tensors, "swiglu", torch.bfloat16), test_utils=checks)
    torch.library.opcheck(quantize_rows_op, (torch.randn(3, 8), TYPES[kind]), test_utils=checks)


def test_wrong_arguments_are_refused():
    x, weight, bias = layer("int8")
    with pytest.raises(ValueError, match=r"quantize to one of torch.int8, torch.float8_e4m3fn, got torch.int4"):
        quantize_rows(torch.randn(2, 3), torch.int4)
    with pytest.raises(ValueError, match="activation must be one of none, gelu_tanh, swiglu"):
        quantized_linear(x, weight, bias, torch.float32, activation="relu")
    with pytest.raises(ValueError, match="both int8 or both e4m3"):
        quantized_linear(x, layer("fp8")[1], bias, torch.float32)
    with pytest.raises(ValueError, match="x has 24 features, the weight takes 20"):
        quantized_linear(x, quantize_rows(torch.randn(N, 20), torch.int8), None, torch.float32)
    with pytest.raises(ValueError, match="must be even, got 7"):
        quantized_linear(x, quantize_rows(torch.randn(7, K), torch.int8), None, torch.float32, activation="swiglu")
    with pytest.raises(ValueError, match=r"gate must be \(2, 1, 8\) or \(2, 5, 8\), got \(2, 1, 4\)"):
        quantized_linear(x, weight, None, torch.float32, gate=torch.randn(B, 1, 4))
    with pytest.raises(ValueError, match=r"residual must be \(2, 5, 8\)"):
        quantized_linear(x, weight, None, torch.float32, residual=torch.randn(B, L, 4))
