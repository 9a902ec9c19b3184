"""What every door of attention asks of its arguments, and the corners where arguments are legal and extreme."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.dense import dense_attention, dense_attention_with_lse
from diffusion_opt.kernels.attention.dense import oracle as dense
from diffusion_opt.kernels.attention.door import attention, explain
from diffusion_opt.kernels.attention.eight_bit import (
    fp8_attention,
    fp8_attention_with_lse,
    int8_attention,
    int8_attention_with_lse,
)
from diffusion_opt.kernels.attention.fp4 import fp4_attention, fp4_attention_with_lse
from diffusion_opt.kernels.attention.region import Region
from diffusion_opt.kernels.attention.sparse import BlockMask, block_sparse_attention, predicted_mask
from diffusion_opt.kernels.runtime import interpreted
from diffusion_opt.quantization import low_precision_attention

DOORS = {
    "dense": dense_attention,
    "dense with lse": dense_attention_with_lse,
    "int8": int8_attention,
    "int8 with lse": int8_attention_with_lse,
    "fp8": fp8_attention,
    "fp8 with lse": fp8_attention_with_lse,
    "nvfp4": fp4_attention,
    "nvfp4 with lse": fp4_attention_with_lse,
    "door": attention,
    "door int8": partial(attention, precision="int8"),
    "door int8-fp8": partial(attention, precision="int8-fp8"),
    "door fp8": partial(attention, precision="fp8"),
    "door nvfp4": partial(attention, precision="nvfp4"),
    "explain": explain,
    "trainable int8": partial(low_precision_attention, format="int8"),
    "trainable fp8": partial(low_precision_attention, format="fp8"),
    "trainable nvfp4": partial(low_precision_attention, format="nvfp4"),
    "formula": dense.attention,
    "fast": dense.fast_attention,
}
PRECISIONS = ("dense", "int8", "int8-fp8", "fp8", "nvfp4")
INTERPRETER = pytest.param("interpreter", marks=pytest.mark.interpreted)
EVERYWHERE = pytest.mark.parametrize("run_in", ["reference", INTERPRETER])


def qkv(lq: int = 6, lk: int = 10, d: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, d, generator=generator).to(dtype) for n in (lq, lk, lk)]


def call(run_in: str, function, *arguments, **options):
    if run_in == "reference":
        return function(*arguments, **options)
    with interpreted():
        return function(*arguments, **options)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.complex64])
@pytest.mark.parametrize("door", DOORS)
def test_a_mask_that_is_neither_bool_nor_a_bias_is_refused(door, dtype):
    mask = (torch.arange(10) < 5).to(dtype)
    with pytest.raises(ValueError, match="a mask is bool"):
        DOORS[door](*qkv(), mask)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])
@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("formula", "fast")])
def test_a_scale_that_float32_cannot_hold_is_refused(door, scale):
    with pytest.raises(ValueError, match="scale"):
        DOORS[door](*qkv(), scale=scale)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("formula", "fast")])
def test_what_does_not_fit_together_is_refused_by_every_door(door):
    q, k, v = qkv()
    for arguments, words in (
        ((q[0], k[0], v[0]), "shape"),
        ((q, k[:, :1], v[:, :1]), "needs k and v"),
        ((q, k, v.half()), "one type"),
        ((q.long(), k.long(), v.long()), "one type, a float"),
        ((q, k, v, torch.ones(7, 10, dtype=torch.bool)), "does not broadcast"),
        ((q[..., :0], k[..., :0], v[..., :0]), "d of 1 or more"),
        ((q, k.to("meta"), v), "one device"),
    ):
        with pytest.raises(ValueError, match=words):
            DOORS[door](*arguments)


@EVERYWHERE
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_least_number_of_every_type_closes(precision, dtype, run_in):
    q, k, v = qkv(dtype=dtype)
    bias = torch.zeros(6, 10, dtype=dtype)
    bias[2] = torch.finfo(dtype).min  # query 2 sees nothing
    bias[4, 5:] = torch.finfo(dtype).min
    out = call(run_in, attention, q, k, v, bias, precision=precision)
    opened = call(run_in, attention, q, k, v, bias == 0, precision=precision)
    assert out[:, :, 2].abs().max() == 0
    assert torch.equal(out, opened)


@EVERYWHERE
@pytest.mark.parametrize("door", ["dense with lse", "int8 with lse", "fp8 with lse", "nvfp4 with lse"])
def test_without_keys_there_are_zeros_and_an_lse_of_minus_infinity(door, run_in):
    out, lse = call(run_in, DOORS[door], *qkv(lk=0))
    assert out.shape == (2, 2, 6, 16) and out.abs().max() == 0
    assert torch.equal(lse, torch.full((2, 2, 6), -math.inf))


@EVERYWHERE
@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_keys_or_queries_every_precision_gives_what_there_is(precision, run_in):
    assert call(run_in, attention, *qkv(lk=0), precision=precision).abs().max() == 0
    assert call(run_in, attention, *qkv(lq=0), precision=precision).shape == (2, 2, 0, 16)


@EVERYWHERE
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-22, 1e15])
def test_tiny_and_huge_queries_and_keys_give_the_softmax_that_they_have(precision, size, run_in):
    q, k, v = qkv(lk=70)
    out = call(run_in, attention, size * q, size * k, v, precision=precision)
    exact, _ = dense.attention(size * q.double(), size * k.double(), v.double())
    assert out.isfinite().all()
    error = ((out.double() - exact).norm() / exact.norm()).item()
    assert error < (0.25 if size < 1 else 0.6)  # at 1e15 one key takes all, and rounding may choose another


@pytest.mark.parametrize(
    ("run_in", "broken"),
    [
        ("reference", math.nan),
        ("reference", math.inf),
        pytest.param("interpreter", math.nan, marks=pytest.mark.interpreted),
    ],
)
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_a_number_never_becomes_one(precision, broken, place, run_in):
    """The rows it belongs to are NaN or infinite wherever the formula's are, in a kernel as in PyTorch."""
    tensors = dict(zip("qkv", qkv(lk=70), strict=True))
    tensors[place][0, 1, 3, 5] = broken
    out = call(run_in, attention, *tensors.values(), precision=precision)
    exact, _ = dense.attention(*tensors.values())
    assert not exact.isfinite().all()
    assert not out[~exact.isfinite()].isfinite().any()
    assert out[1].isfinite().all() and out[0, 0].isfinite().all()


@EVERYWHERE
@pytest.mark.parametrize(
    ("values_in", "size"), [("fp16", 7e4), ("fp16_fast", 3000.0), ("fp16_fast", 1e9), ("fp8", 1e9)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_float16_come_out_as_they_are(values_in, size, dtype, run_in):
    q, k, v = qkv(lk=80, dtype=dtype)
    q, k = q * 0.01, k * 0.01  # every key counts, so that sums are large
    v = (v.float().abs() + 1).mul(size).to(dtype)
    out = call(run_in, int8_attention, q, k, v, values_in=values_in)
    exact, _ = dense.attention(q.double(), k.double(), v.double())
    assert ((out.double() - exact).norm() / exact.norm()).item() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_lse_of_half_precision_is_computed_in_float32_on_a_cpu(dtype):
    q, k, v = qkv(129, 129, 128, dtype)
    out, lse = dense_attention_with_lse(q, k, v)
    exact, exact_lse = dense.attention(q.double(), k.double(), v.double())
    assert (lse - exact_lse).abs().max() < 2e-6
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    q, k = 200 * q, 200 * k  # scores of 1e5, beyond float16
    assert dense_attention_with_lse(q, k, v)[0].isfinite().all()


def test_the_gradient_of_half_precision_is_computed_in_float32_on_a_cpu():
    tensors = [x.requires_grad_() for x in qkv(40, 70, 32, torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    for inputs in (tensors, wide):
        out, lse = dense_attention_with_lse(*inputs)
        (out.double().square().sum() + lse.double().sum()).backward()
    for x, exact in zip(tensors, wide, strict=True):
        assert ((x.grad.double() - exact.grad).norm() / exact.grad.norm()).item() < 6e-3  # two roundings to bfloat16


@EVERYWHERE
def test_slots_behind_the_lengths_are_never_read(run_in):
    lengths = torch.tensor([10, 16, 3], dtype=torch.int32)
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16, 16, lengths)
    inputs = [x[:1, :1].clone().requires_grad_() for x in qkv(48, 48, 16)]
    real = (torch.arange(16) < lengths[:, None]).flatten()
    spoiled = [x.detach().clone() for x in inputs]
    for x in spoiled[1:]:
        x[:, :, ~real] = math.nan
    spoiled = [x.requires_grad_() for x in spoiled]
    results = []
    for tensors in (inputs, spoiled):
        out, lse = call(run_in, block_sparse_attention, *tensors, mask)
        call(run_in, torch.autograd.backward, [out, lse], [torch.ones_like(out), torch.ones_like(lse)])
        results.append((out, lse, tensors[0].grad, *(x.grad[:, :, real] for x in tensors[1:])))
    for clean, got in zip(*results, strict=True):
        assert torch.equal(clean, got)


@EVERYWHERE
def test_slots_of_a_cache_behind_the_lengths_are_never_read(run_in):
    lengths = torch.tensor([10, 16], dtype=torch.int32)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 2, dtype=torch.bool), 16, 16, lengths)
    region = Region.from_index(torch.arange(8)[None].expand(2, -1), 32)
    q, k, v = qkv(8, 8, 32)
    cache = torch.randn(2, 2, 32, 32)
    spoiled = cache.clone()
    spoiled[:, :, 12] = math.nan
    outs = [call(run_in, region.attention, q, k, v, c.clone(), c.clone(), mask)[0] for c in (cache, spoiled)]
    assert torch.equal(*outs)


@pytest.mark.wrong_shapes
def test_a_region_takes_only_what_fits_it():
    region = Region.from_index(torch.arange(20, dtype=torch.int32).repeat(2, 1), 64)
    cache, rows = torch.randn(2, 3, 64, 16), torch.randn(2, 3, 20, 16)
    mask = BlockMask.from_dense(torch.ones(1, 2, 2, 4, dtype=torch.bool), 16, 16)
    with interpreted():
        with pytest.raises(ValueError, match=r"\(2, 3\), the mask has \(1, 2\)"):
            region.attention(rows, rows, rows, cache, cache.clone(), mask)
        with pytest.raises(ValueError, match="20 active rows, q has 12"):
            region.attention(rows[:, :, :12], rows, rows, cache, cache.clone())
    with pytest.raises(ValueError, match="2 batch entries of 64 tokens"):
        region.gather(torch.randn(3, 64, 8))
    with pytest.raises(ValueError, match="serves one batch entry"):
        region.packed_mask(BlockMask.from_dense(torch.ones(3, 1, 4, 4, dtype=torch.bool), 16, 16), 16)
    with pytest.raises(ValueError, match="bool mask of tokens"):
        Region.from_mask(torch.ones(2, 64, dtype=torch.int64))


@pytest.mark.wrong_shapes
def test_tables_of_tiles_are_bool_and_lengths_are_one_for_each_block():
    with pytest.raises(ValueError, match="table of tiles is bool"):
        BlockMask.from_dense(torch.full((1, 1, 2, 2), 2), 16, 16)
    q, k, _ = qkv(48, 48)
    with pytest.raises(ValueError, match="48 tokens of q are 3 blocks, lengths are given for 1"):
        predicted_mask(q, k, 16, 16, keep=0.5, lengths=torch.tensor([16], dtype=torch.int32))
