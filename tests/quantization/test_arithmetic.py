"""The formats written out, against modelopt's quantizers and packed tensors and the kernels' reference: equal bits."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.kernels.quantizers import formats as kernel_formats
from diffusion_opt.quantization.arithmetic.fp8 import e4m3, fp8
from diffusion_opt.quantization.arithmetic.int4 import int4
from diffusion_opt.quantization.arithmetic.int8 import int8
from diffusion_opt.quantization.arithmetic.mx import mxfp8
from diffusion_opt.quantization.arithmetic.nvfp4 import E2M1, e2m1, nvfp4
from diffusion_opt.quantization.arithmetic.svd import svd_split

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.model_calib import svd as modelopt_svd
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor


def tensor(kind: str, rows: int = 24, columns: int = 160) -> Tensor:
    """A matrix to round; each kind is where some rounding code goes wrong."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "heavy tailed":
        return x / torch.rand(rows, columns, generator=generator).clamp(min=1e-3)
    if kind == "every size":
        return x * torch.logspace(-12, 8, rows)[:, None]
    if kind == "zeros":
        return torch.zeros(rows, columns)
    if kind == "zero rows":
        return x * (torch.arange(rows) % 3 > 0)[:, None]
    if kind == "one outlier":
        return (1e-3 * x).index_put((torch.tensor(5), torch.tensor(7)), torch.tensor(-3000.0))
    if kind == "denormals":
        return x * 1e-40
    if kind == "ties":
        return (x * 8).round() / 4
    return x


KINDS = ("normal", "heavy tailed", "every size", "zeros", "zero rows", "one outlier", "denormals", "ties")


def modelopt_rounds(x: Tensor, amax: Tensor | None, **attributes: object) -> Tensor:
    """x through a quantizer of modelopt with a given range."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**attributes))
    if amax is not None:
        quantizer.amax = amax
    return quantizer(x.clone())


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_modelopts(kind):
    x = tensor(kind)
    rows, whole, cut = x.abs().amax(1, keepdim=True), x.abs().amax(), 0.4 * x.abs().amax()
    assert torch.equal(int8(x, rows), modelopt_rounds(x, rows, num_bits=8, axis=0))
    assert torch.equal(int8(x, whole), modelopt_rounds(x, whole, num_bits=8))
    assert torch.equal(int8(x, cut), modelopt_rounds(x, cut, num_bits=8))  # the tail saturates
    per_token = modelopt_rounds(x, None, num_bits=8, type="dynamic", block_sizes={-1: None})
    assert torch.equal(int8(x, rows), per_token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [128, 160])  # 160 is no multiple of 64
def test_int4_blocks_are_modelopts(kind, columns):
    x = tensor(kind, columns=columns)
    assert torch.equal(int4(x, 64), modelopt_rounds(x, None, num_bits=4, block_sizes={-1: 64}))


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_modelopts(kind):
    x = tensor(kind)
    for amax in (x.abs().amax(), 0.4 * x.abs().amax()):
        assert torch.equal(fp8(x, amax), modelopt_rounds(x, amax, num_bits=(4, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [128, 152])  # 152 is no multiple of 32
def test_mxfp8_is_modelopts_packed_tensor(kind, columns):
    x = tensor(kind, columns=columns)
    packed, scale = MXFP8QTensor.quantize(x.clone())
    assert torch.equal(mxfp8(x), packed.dequantize(scale=scale))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zeros"])  # there modelopt divides 0 by 0
@pytest.mark.parametrize("columns", [128, 152])
@pytest.mark.parametrize("range_", [1.0, 0.5])  # with a smaller range the largest blocks saturate
def test_nvfp4_is_modelopts_packed_tensor(kind, columns, range_):
    x = tensor(kind, columns=columns)
    padded, amax = F.pad(x, (0, -columns % 16)), range_ * x.abs().amax()  # it cannot unpack rows that it had to pad
    packed, scale, double = NVFP4QTensor.quantize(padded.clone(), 16, weights_scaling_factor_2=amax / (6 * 448))
    theirs = packed.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})[:, :columns]
    assert torch.equal(nvfp4(x, amax), theirs)


def test_zeros_stay_zeros():
    zeros = tensor("zeros")
    assert torch.equal(nvfp4(zeros), zeros) and torch.equal(mxfp8(zeros), zeros)
    assert torch.equal(nvfp4(torch.full((2, 16), 1e-45)), zeros[:2, :16])  # smaller than any scale


@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_and_e4m3_are_those_of_the_kernels(kind):
    x = tensor(kind)
    tile = kernel_formats.nvfp4_tiles(x, -1)
    scales, codes = kernel_formats.block_scales_and_codes(x, tile.scales.reshape(1))
    assert torch.equal(nvfp4(x), codes * (scales * tile.scales).repeat_interleave(16, -1))
    assert torch.equal(e4m3(x), kernel_formats.round_e4m3(x))
    assert torch.equal(e2m1(x), kernel_formats.round_e2m1(x))


def test_e4m3_rounds_every_half_number_as_the_cast_of_torch_does():
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    z = halves[halves.isfinite() & (halves.abs() <= 464)]  # above, the cast gives NaN
    assert torch.equal(e4m3(z), z.to(torch.float8_e4m3fn).float())
    assert e4m3(torch.tensor([1e9, -1e9])).tolist() == [448.0, -448.0]


def test_the_grids_map_onto_themselves():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()]
    assert torch.equal(e4m3(numbers), numbers)
    assert torch.equal(e2m1(E2M1), E2M1)
    for rounding in (nvfp4, mxfp8, lambda x: int4(x, 64)):
        once = rounding(tensor("heavy tailed"))
        assert torch.equal(rounding(once), once)


@pytest.mark.parametrize("rank", [1, 5])
def test_svd_split_is_modelopts_and_the_best_there_is(rank):
    weight = tensor("heavy tailed", 24, 32)
    residual, b, a = svd_split(weight, rank)
    their_b, their_a = modelopt_svd(weight, rank)
    assert torch.equal(b, their_b) and torch.equal(a, their_a)
    assert torch.equal(residual, weight - b @ a)
    singular = torch.linalg.svdvals(weight.double())
    assert float(torch.linalg.matrix_norm(residual.double(), 2)) == pytest.approx(float(singular[rank]), rel=1e-5)
    with pytest.raises(ValueError, match=r"rank must be 1 … 24 for a matrix of \(24, 32\), got 25"):
        svd_split(weight, 25)


def test_a_branch_makes_the_outlier_direction_harmless():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 64, generator=generator)
    direction = torch.randn(64, 1, generator=generator) @ torch.randn(1, 64, generator=generator)
    weight = noise + 10 * direction
    residual, b, a = svd_split(weight, 1)
    plain, split = (nvfp4(weight) - weight).norm(), (nvfp4(residual) + b @ a - weight).norm()
    assert split < 0.3 * plain


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_are_refused(bad):
    x = tensor("normal")
    x[3, 5] = bad
    one = torch.tensor(1.0)
    roundings = [lambda: int8(x, one), lambda: int4(x), lambda: fp8(x, one), lambda: mxfp8(x), lambda: nvfp4(x)]
    for rounding in [*roundings, lambda: svd_split(x, 2)]:
        with pytest.raises(ValueError, match="1 of 3840 numbers are inf or NaN"):
            rounding()
    with pytest.raises(ValueError, match="1 of 1 numbers"):
        int8(tensor("normal"), torch.tensor(bad))
