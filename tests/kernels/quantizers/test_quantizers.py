"""Rounding is what the formats say, scales belong to the right tokens, and the kernels give the oracle's bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_opt.kernels.quantizers import formats
from diffusion_opt.kernels.quantizers import operator as quantize
from diffusion_opt.kernels.quantizers import oracle as reference
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK, KEY_GROUPS, QUERY_BLOCK, QUERY_GROUPS

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUPS = {f"{role} {name}": groups for role, table in (("query", QUERY_GROUPS), ("key", KEY_GROUPS))
          for name, groups in table.items()}  # fmt: skip


def heads(length: int = 150, d: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """A view of (b, l, h, d) with a biased channel, a block of zeros and a ragged end."""
    x = (3 * torch.randn(1, length, 2, d, generator=torch.Generator().manual_seed(1))).to(dtype).transpose(1, 2)
    x[..., 7] += 5
    x[:, 1, 64:128] = 0
    return x


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def test_int8_ties_go_away_from_zero():
    z = torch.tensor([-2.5, -0.5, -0.49, 0.0, 0.5, 1.5, 126.5, 200.0, -200.0])
    assert formats.round_int8(z).tolist() == [-3, -1, 0, 0, 1, 2, 127, 127, -127]


def test_e4m3_is_torch_cast_and_saturates():
    z = torch.linspace(-500, 500, 4001)
    assert torch.equal(formats.round_e4m3(z), z.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_e2m1_takes_the_nearest_number_and_ties_to_even():
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(formats.round_e2m1(middles), even) and torch.equal(formats.round_e2m1(-middles), -even)
    z = torch.linspace(-7, 7, 1999)
    nearest = E2M1[(z.abs()[:, None] - E2M1).abs().argmin(1)]
    assert torch.equal(formats.round_e2m1(z).abs(), nearest)


@pytest.mark.slow  # modelopt takes seconds to import
def test_nvfp4_is_modelopt_bit_for_bit():
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor, e2m1_values

    x = torch.randn(64, 128) * torch.logspace(-4, 3, 64)[:, None]
    packed, scales, unit = NVFP4QTensor.quantize(x.clone(), 16)
    own_scales, own_codes = formats.block_scales_and_codes(x, unit.reshape(1))
    packed = packed._quantized_data
    codes = torch.stack((e2m1_values[(packed & 15).long()], e2m1_values[(packed >> 4).long()]), -1).flatten(-2)
    assert torch.equal(own_scales, scales.float())
    assert torch.equal(own_codes, codes)
    values = formats.nvfp4_tiles(x, -1)
    assert values.scales == unit
    assert torch.equal(values.values, codes * scales.float().repeat_interleave(16, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_nvfp4_exactly(dtype):
    values = formats.nvfp4_tiles(torch.randn(64, 128) * torch.logspace(-6, 2, 64)[:, None], -2).values
    assert torch.equal(values.to(dtype).float(), values)


def test_nvfp4_scales_with_its_input():
    x = heads()[:, :1]
    one, other = (reference.quantize_nvfp4(factor * x, KEY_BLOCK, "tokens") for factor in (1, 2**-20))
    assert torch.equal(one.values, other.values) and torch.equal(one.scales * 2**-20, other.scales)


def test_nvfp4_wants_whole_blocks():
    with pytest.raises(ValueError, match=r"blocks of 16: pad the 24"):
        formats.block_scales_and_codes(torch.ones(2, 24), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "token", "sharers"),
    [
        ("query block", 130, range(128, 150)),
        ("key block", 70, range(128)),
        ("query thread", 33, [33, 41, 49, 57]),
        ("key thread", 2, [8 * i + j for i in range(8) for j in (2, 3)]),
    ],
)
def test_tokens_that_share_a_scale(name, token, sharers):
    index = GROUPS[name].index(150)
    assert (index == index[token]).nonzero().flatten().tolist() == list(sharers)
    assert int(index.max()) < GROUPS[name].num_scales(150)


@pytest.mark.parametrize("name", GROUPS)
@given(length=st.integers(1, 200))
@settings(max_examples=15, deadline=None)
def test_largest_of_each_group(name, length):
    sizes = torch.rand(2, length)
    index = GROUPS[name].index(length)
    largest = GROUPS[name].largest(sizes)
    assert largest.shape[-1] == GROUPS[name].num_scales(length)
    for group in range(largest.shape[-1]):
        members = sizes[:, index == group]
        assert torch.equal(largest[:, group], members.amax(-1) if members.numel() else torch.zeros(2))


@pytest.mark.parametrize("name", GROUPS)
def test_int8_error_is_half_a_step(name):
    x, groups = heads(), GROUPS[name]
    mean = reference.smoothing_mean(x)
    codes, scales = reference.quantize_tokens(x, "int8", groups, mean)
    step = scales[:, :, groups.index(x.shape[2]), None]
    assert ((codes * step - (x - mean[:, :, None])).abs() <= step * (0.5 + 1e-5)).all()
    assert codes.abs().amax() == 127


def test_block_means_leave_out_what_is_not_there():
    x = heads(length=150)
    expected = torch.stack((x[:, :, :128].mean(2), x[:, :, 128:].mean(2)), 2)
    torch.testing.assert_close(reference.block_means(x), expected)
    torch.testing.assert_close(reference.block_means(x[:, :, :40])[:, :, 0], x[:, :, :40].mean(2))


def test_padding_tokens_do_not_count():
    """A ragged tile is rounded as if the missing tokens were zeros after smoothing, not before."""
    x = heads(length=70) + 100
    mean = reference.smoothing_mean(x)[:, :, None]
    ragged = reference.quantize_nvfp4(x, KEY_BLOCK, "channels", mean)
    assert (ragged.scales[..., 1] < 20 / formats.NVFP4_MAX).all()


def test_operators_do_not_touch_their_input_and_keep_layouts():
    x = heads(dtype=torch.bfloat16)
    before = x.clone()
    codes = quantize.quantize_channels(x).codes
    quantize.quantize_tokens(x, "int8", KEY_GROUPS["block"], reference.smoothing_mean(x))
    quantize.quantize_nvfp4(x, KEY_BLOCK, "tokens")
    assert torch.equal(x, before)
    assert codes.stride(2) == 1 and codes.stride(3) % quantize.TOKEN_ALIGNMENT == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_know_their_shapes(dtype):
    x = heads(length=33, d=24, dtype=dtype)
    mean = reference.smoothing_mean(x)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(quantize.tokens_op, (x, mean, "fp8", 32, 8, 1), test_utils=checks)
    torch.library.opcheck(quantize.channels_op, (x, torch.ones(1, 2, 24)), test_utils=checks)
    torch.library.opcheck(quantize.nvfp4_op, (x, mean[:, :, None], 64, "tokens"), test_utils=checks)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_token_kernel_gives_the_oracles_bits(to, dtype, device):
    x = heads(dtype=dtype).to(device)
    mean = reference.smoothing_mean(x)
    for groups, shift in zip(GROUPS.values(), (None, mean, mean, None), strict=True):
        expected = reference.quantize_tokens(x, to, groups, shift)
        actual = quantize.quantize_tokens(x, to, groups, shift)
        assert torch.equal(bits(actual.codes), bits(expected.codes)) and torch.equal(actual.scales, expected.scales)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_kernel_gives_the_oracles_bits(dtype, device):
    x = heads(dtype=dtype).to(device)
    expected, actual = reference.quantize_channels(x), quantize.quantize_channels(x)
    assert torch.equal(bits(actual.codes.contiguous()), bits(expected.codes))
    assert torch.equal(actual.scales, expected.scales)


@pytest.mark.interpreted
@pytest.mark.parametrize("along", ["channels", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nvfp4_kernel_gives_the_oracles_bits(along, dtype, device):
    x = heads(dtype=dtype).to(device)
    means = {KEY_BLOCK: reference.smoothing_mean(x)[:, :, None], QUERY_BLOCK: reference.block_means(x)}
    for tile, mean in ((KEY_BLOCK, None), *means.items()):
        expected, actual = (room.quantize_nvfp4(x, tile, along, mean) for room in (reference, quantize))
        assert torch.equal(actual.values.float(), expected.values) and torch.equal(actual.scales, expected.scales)
