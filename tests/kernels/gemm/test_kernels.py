"""The kernels of quantized linear layers against their references: codes bit for bit, products to rounding."""

import pytest
import torch
from kernels.accuracy import assert_at_most_twice_the_error_of_torch
from torch import Tensor

from diffusion_opt.kernels.gemm import oracle as reference
from diffusion_opt.kernels.gemm.operator import QuantizedRows, quantize_rows, quantized_linear

pytestmark = pytest.mark.interpreted

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SHAPES = {  # (b, l, k, n): several tiles each way and steps of k; less than a tile; ragged k
    "tiles": (1, 150, 256, 144),
    "small": (1, 3, 128, 16),
    "ragged": (2, 9, 144, 48),
}


def layer(shape: str, kind: str, device: torch.device) -> tuple[QuantizedRows, QuantizedRows, Tensor]:
    b, length, k, n = SHAPES[shape]
    x, weight = torch.randn(b, length, k, device=device), torch.randn(n, k, device=device)
    return quantize_rows(x, TYPES[kind]), quantize_rows(weight, TYPES[kind]), torch.randn(n, device=device)


def expected(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, dtype: torch.dtype, **epilogue) -> Tensor:
    (b, length, k), settings = x.values.shape, {"activation": "none", "gate": None, "residual": None, **epilogue}
    z = reference.quantized_product(x.values.reshape(-1, k), x.scales.reshape(-1), weight.values, weight.scales)
    return reference.epilogue(z.view(b, length, -1), bias, dtype=dtype, **settings)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_codes_and_scales_are_those_of_the_reference(dtype, kind, device):
    x = (torch.randn(7, 50, device=device) * torch.exp2(3 * torch.randn(7, 1, device=device))).to(dtype)
    x[3] = 0
    x[4, :3] = torch.tensor([127.0, 0.5, -1.5])  # a scale of 1 in int8: ties
    got = quantize_rows(x, TYPES[kind])
    values, scales = reference.quantize_rows(x, TYPES[kind])
    assert torch.equal(got.scales, scales)
    assert torch.equal(got.values.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_with_bias(shape, kind, device):
    x, weight, bias = layer(shape, kind, device)
    got = quantized_linear(x, weight, bias, torch.float32)
    torch.testing.assert_close(got, expected(x, weight, bias, torch.float32), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_activation_gate_and_residual(activation, kind, device):
    x, weight, bias = layer("ragged", kind, device)
    b, length, _, n = SHAPES["ragged"]
    c = n // 2 if activation == "swiglu" else n
    gate = torch.randn(b, 1, 3 * c, device=device).chunk(3, dim=-1)[1]
    residual = torch.randn(b, length + 4, c, device=device)[:, 4:]
    settings = {"activation": activation, "gate": gate, "residual": residual}
    got = quantized_linear(x, weight, bias, torch.float32, **settings)
    torch.testing.assert_close(got, expected(x, weight, bias, torch.float32, **settings), rtol=1e-5, atol=1e-4)


def test_a_gate_for_each_token_and_no_bias(device):
    x, weight, _ = layer("ragged", "int8", device)
    gate = torch.randn(2, 9, 48, device=device)
    got = quantized_linear(x, weight, None, torch.float32, gate=gate)
    torch.testing.assert_close(got, expected(x, weight, None, torch.float32, gate=gate), rtol=1e-5, atol=1e-4)


def test_output_is_rounded_once(device):
    x, weight, bias = layer("ragged", "int8", device)
    residual = torch.randn(2, 9, 48, device=device).bfloat16()
    got = quantized_linear(x, weight, bias.bfloat16(), torch.bfloat16, residual=residual)
    exact = expected(x, weight, bias.bfloat16(), torch.float32, residual=residual).double()
    assert_at_most_twice_the_error_of_torch(got, exact.bfloat16(), exact)


def test_integer_sums_do_not_overflow_or_round(device):
    """Codes of 127 everywhere: sums beyond the 24 bits that float32 holds exactly."""
    ones = QuantizedRows(torch.full((1, 2, 2048), 127, device=device).to(torch.int8), torch.ones(1, 2, device=device))
    weight = QuantizedRows(torch.full((16, 2048), 127, device=device).to(torch.int8), torch.ones(16, device=device))
    weight.values[1, 0] = 126  # a difference in the last place
    out = quantized_linear(ones, weight, None, torch.float32)
    assert (
        float(out[0, 0, 0]) == 127 * 127 * 2048 and float(out[0, 0, 1]) == torch.tensor(127 * (127 * 2048 - 1)).float()
    )


def test_what_no_kernel_can_do_is_refused(device):
    x, weight = quantize_rows(torch.randn(1, 3, 40, device=device), torch.int8), torch.randn(16, 40, device=device)
    with pytest.raises(ValueError, match="multiples of 16, got 40 and 16"):
        quantized_linear(x, quantize_rows(weight, torch.int8), None, torch.float32)
