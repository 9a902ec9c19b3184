"""Scales, codes and means of what is not a number, is not there, or does not fit; in the kernels as in PyTorch."""

import math

import pytest
import torch

from diffusion_opt.kernels.fused.qk_norm_rope import qk_norm_rope_quantized
from diffusion_opt.kernels.gemm import QuantizedRows, quantize_rows, quantized_linear
from diffusion_opt.kernels.quantizers import quantize_channels, quantize_nvfp4, quantize_tokens
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS
from diffusion_opt.kernels.runtime import interpreted

pytestmark = pytest.mark.interpreted

KEYS = KEY_GROUPS["block"]


def both(function, *arguments):
    """What PyTorch and what the kernel gives."""
    plain = function(*arguments)
    with interpreted():
        return plain, function(*arguments)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert torch.equal(one.isnan(), other.isnan())
    assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_with_what_is_no_number_has_a_scale_that_is_none(dtype, broken):
    x = torch.randn(1, 2, 200, 32).to(dtype)
    x[0, 1, 70, 5] = broken
    for to in ("int8", "fp8"):
        plain, kernel = both(quantize_tokens, x, to, KEYS)
        assert_same(plain.scales, kernel.scales)
        assert not plain.scales[0, 1, 70 // KEYS.window].isfinite() and plain.scales[0, 0].isfinite().all()
    plain, kernel = both(quantize_channels, x)
    assert_same(plain.scales, kernel.scales)
    assert_same(plain.codes.float(), kernel.codes.float())
    for along in ("channels", "tokens"):
        plain, kernel = both(quantize_nvfp4, x, 64, along)
        assert_same(plain.scales, kernel.scales)
        assert_same(plain.values.float(), kernel.values.float())


@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn])
def test_a_row_with_nan_gives_a_row_of_nan(to):
    x, weight = torch.randn(1, 5, 32), torch.randn(48, 32)
    x[0, 2, 3] = math.nan

    def linear() -> torch.Tensor:
        return quantized_linear(quantize_rows(x, to), quantize_rows(weight, to), None, torch.float32)

    for out in both(linear):
        assert out[0, 2].isnan().all() and out[0, [0, 1, 3, 4]].isfinite().all()


def test_normed_and_rotated_tokens_keep_nan():
    x = torch.randn(1, 2, 70, 32)
    x[0, 1, 3, 4] = math.nan
    for codes, _ in both(qk_norm_rope_quantized, x, torch.ones(32), None, "int8", QUERY_GROUPS["block"]):
        assert codes.scales[0, 1, 0].isnan() and codes.scales[0, 0].isfinite().all()


def test_channels_without_tokens_have_a_scale_of_1():
    plain, kernel = both(quantize_channels, torch.randn(2, 3, 0, 16))
    for result in (plain, kernel):
        assert result.codes.shape == (2, 3, 0, 16) and torch.equal(result.scales, torch.ones(2, 3, 16))


@pytest.mark.wrong_shapes
def test_what_a_kernel_would_read_past_is_refused():
    x = torch.randn(2, 3, 70, 64)
    with pytest.raises(ValueError, match=r"needs a mean of shape \(2, 3, 64\)"):
        quantize_tokens(x, "int8", KEYS, torch.randn(1, 1, 64))
    with pytest.raises(ValueError, match=r"needs a mean of shape \(2, 3, 2, 64\)"):
        quantize_nvfp4(x, 64, "channels", torch.randn(2, 3, 3, 64))
    with pytest.raises(ValueError, match="needs a mean of shape"):
        qk_norm_rope_quantized(x, torch.ones(64), None, "int8", KEYS, torch.randn(2, 1, 64))
    with pytest.raises(ValueError, match="power of two"):
        quantize_nvfp4(x, 48, "channels")
    with pytest.raises(ValueError, match="codes are int8 or fp8"):
        quantize_tokens(x, "int4", KEYS)
    rows, weight = quantize_rows(torch.randn(1, 16, 32), torch.int8), quantize_rows(torch.randn(32, 32), torch.int8)
    with pytest.raises(ValueError, match="each of the 32 outputs"):
        quantized_linear(rows, weight, torch.ones(1), torch.float32)
    with pytest.raises(ValueError, match="float32 scale each"):
        QuantizedRows(rows.values, rows.scales[:, :1])
    with pytest.raises(ValueError, match=r"x is \(b, l, k\)"):
        quantized_linear(weight, weight, None, torch.float32)
