"""INT8, FP8 and FP4 attention: operators like any other, and kernels as close to the oracle as PyTorch itself."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.dense import oracle as dense
from diffusion_opt.kernels.attention.eight_bit.fp8 import fp8_attention, fp8_attention_with_lse
from diffusion_opt.kernels.attention.eight_bit.int8 import int8_attention, int8_attention_with_lse, smoothing_share
from diffusion_opt.kernels.attention.eight_bit.operator import eight_bit_op, half_values
from diffusion_opt.kernels.attention.eight_bit.oracle import attention_8bit
from diffusion_opt.kernels.attention.fp4 import operator as fp4_module
from diffusion_opt.kernels.attention.fp4 import oracle as fp4
from diffusion_opt.kernels.attention.fp4.operator import fp4_attention, fp4_attention_with_lse
from diffusion_opt.kernels.launch import LAUNCH
from diffusion_opt.kernels.quantizers.operator import quantize_channels, quantize_tokens
from diffusion_opt.kernels.quantizers.oracle import EIGHT_BIT_KEYS, KEY_BLOCK, KEY_GROUPS, QUERY_GROUPS, smoothing_mean

WITH_LSE = {"int8": int8_attention_with_lse, "fp8": fp8_attention_with_lse, "nvfp4": fp4_attention_with_lse}
EIGHT_BIT = [
    ("int8", "block", "fp16"),
    ("int8", "thread", "fp16"),
    ("int8", "block", "fp16_fast"),
    ("int8", "thread", "fp8"),
    ("fp8", "block", "fp8"),
]
MASKS = ["none", "bool", "bias"]


def operands(lq: int, lk: int, d: int, dtype: torch.dtype = torch.float32, device="cpu") -> list[Tensor]:
    """q, k, v as views of (b, l, h, d); keys have channels with a mean."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((lq, 0.0), (lk, 2.0), (lk, 0.0))
    tensors = []
    for length, bias in shapes:
        x = torch.randn(1, length, 2, d, generator=generator) + bias * torch.randn(d, generator=generator)
        tensors.append(x.to(dtype).to(device).transpose(1, 2))
    return tensors


def mask_of(kind: str, lq: int, lk: int, device="cpu") -> Tensor | None:
    """Closed for 3 of 10 pairs; query 5 sees nothing."""
    generator = torch.Generator().manual_seed(1)
    opened = torch.rand(1, 1, lq, lk, generator=generator) > 0.3
    opened[:, :, 5] = False
    bias = torch.where(opened, torch.randn(1, 1, lq, lk, generator=generator), -torch.inf)
    mask = {"none": None, "bool": opened, "bias": bias}[kind]
    return mask if mask is None else mask.to(device)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other).norm() / other.norm()).item()


@pytest.mark.parametrize("precision", WITH_LSE)
def test_close_to_dense_attention(precision):
    q, k, v = operands(90, 130, 24)
    mask = mask_of("bias", 90, 130)
    out, lse = WITH_LSE[precision](q, k, v, mask)
    exact, exact_lse = dense.attention(q, k, v, mask)
    bound = {"int8": 0.02, "fp8": 0.07, "nvfp4": 0.25}[precision]
    assert distance(out, exact) < bound and out.stride() == q.stride()
    empty = exact_lse == -torch.inf
    assert empty.any() and torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    assert (lse - exact_lse)[~empty].abs().max() < 5 * bound


def test_the_short_form_is_the_output():
    q, k, v = operands(20, 30, 16)
    for short, precision in ((int8_attention, "int8"), (fp8_attention, "fp8"), (fp4_attention, "nvfp4")):
        assert torch.equal(short(q, k, v), WITH_LSE[precision](q, k, v)[0])


@pytest.mark.parametrize("precision", WITH_LSE)
def test_bad_arguments_are_named(precision):
    q, k, v = operands(20, 30, 16)
    attend = WITH_LSE[precision]
    with pytest.raises(ValueError, match="scale must be positive"):
        attend(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match="does not broadcast"):
        attend(q, k, v, torch.ones(7, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match="one type"):
        attend(q, k.half(), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_beyond_float16_are_divided_by_a_power_of_two(dtype):
    v = torch.tensor([[[[2.0**20, -(2.0**17), 65280.0, 1.0]]]]).to(dtype)
    values = half_values(v)
    assert values.scales.tolist() == [[[32.0, 4.0, 1.0, 1.0]]]
    assert torch.equal(values.codes.to(dtype) * values.scales[:, :, None].to(dtype), v)
    sums = half_values(torch.full((1, 1, 3, 1), 3000.0), sums=True)
    assert (
        float(sums.codes.max()) * 128 <= 65504
        and float((sums.codes.float() * sums.scales[:, :, None])[0, 0, 0]) == 3000
    )


def test_eight_bit_attention_has_no_gradient_and_says_so():
    q, k, v = operands(20, 30, 16)
    out = int8_attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


@pytest.mark.parametrize("smoothing", ["none", "k", "qk"])
def test_fp4_trains_with_the_gradient_of_its_oracle(smoothing):
    tensors = [x.requires_grad_() for x in operands(70, 90, 24)]
    mask, grad = mask_of("bool", 70, 90), torch.randn(1, 2, 70, 24)
    actual = torch.autograd.grad(fp4_attention(*tensors, mask, smoothing=smoothing), tensors, grad)
    oracle = fp4.straight_through_attention(*tensors, mask, 24**-0.5, smoothing)
    for one, other in zip(actual, torch.autograd.grad(oracle, tensors, grad), strict=True):
        assert distance(one, other.double()) < 1e-5


def test_fp4_lse_carries_no_gradient():
    q, k, v = operands(20, 30, 16)
    out, lse = fp4_attention_with_lse(q.requires_grad_(), k, v)
    assert out.requires_grad and not lse.requires_grad


def test_operators_know_their_shapes_and_gradients():
    q, k, v = operands(33, 40, 16, torch.bfloat16)
    codes = (*quantize_tokens(q, "int8", QUERY_GROUPS["block"]), *quantize_tokens(k, "int8", KEY_GROUPS["block"]))
    checks = ("test_schema", "test_faketensor")
    values = half_values(v)
    torch.library.opcheck(eight_bit_op, (*codes, *values, None, 0.25, "block", "fp16", q), test_utils=checks)
    trained = [x.detach().float().requires_grad_() for x in (q, k, v)]
    checks = (*checks, "test_autograd_registration")
    torch.library.opcheck(fp4_module.fp4_op, (*trained, None, 0.25, "qk", True), test_utils=checks)


@pytest.mark.interpreted
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("to", "granularity", "values_in"), EIGHT_BIT)
def test_eight_bit_kernel_against_its_oracle(to, granularity, values_in, mask, device):
    """At most twice the error of the same arithmetic in PyTorch."""
    lq, lk, d = 77, 200, 40
    q, k, v = operands(lq, lk, d, torch.bfloat16, device)
    closed, mean, scale = mask_of(mask, lq, lk, device), smoothing_mean(k), d**-0.5
    options = {} if to == "fp8" else {"granularity": granularity, "values_in": values_in}
    out, lse = WITH_LSE[to](q, k, v, closed, **options)
    codes = (quantize_tokens(q, to, QUERY_GROUPS[granularity]), quantize_tokens(k, to, KEY_GROUPS[granularity], mean))
    values = quantize_channels(v) if values_in == "fp8" else half_values(v)
    exact_in = "fp16" if values_in == "fp16_fast" else values_in  # its float16 sums are what is tested
    arguments = (*codes, values, closed, scale, granularity)
    tile = EIGHT_BIT_KEYS if mask == "none" else KEY_BLOCK  # the kernel's, which a mask leaves less room
    exact, exact_lse = attention_8bit(*arguments, exact_in, tile, torch.float64)
    same, _ = attention_8bit(*arguments, values_in, tile)
    assert distance(out, exact) <= 2 * distance(same.bfloat16(), exact) + 1e-6
    finite = exact_lse.isfinite()
    exact_lse = exact_lse + smoothing_share(q, mean, scale)
    torch.testing.assert_close(lse[finite].double(), exact_lse[finite], rtol=0, atol=1e-5)
    assert (out[~finite] == 0).all() and (lse[~finite] == -torch.inf).all() and (~finite).any() == (mask != "none")


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "mask"), [("none", "bool"), ("k", "none"), ("qk", "bias"), ("qk", "none")])
def test_fp4_kernels_against_their_oracle(smoothing, mask, dtype, device):
    """Output and three gradients, each with at most twice the error of PyTorch at the same precision."""
    lq, lk, d = 150, 100, 40  # two tiles of queries for smoothing, two of keys
    tensors = operands(lq, lk, d, dtype, device)
    grad = torch.randn(1, 2, lq, d, generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    closed, scale = mask_of(mask, lq, lk, device), d**-0.5
    out = fp4_attention(*[x.requires_grad_() for x in tensors], closed, smoothing=smoothing)
    actual = (out.detach(), *torch.autograd.grad(out, tensors, grad))
    with torch.no_grad():
        x = fp4.prepare(*tensors, smoothing)
        exact, same = ((one, *rest) for one, *rest in (fp4_results(x, closed, scale, grad, kind) for kind in
                                                       (torch.float64, torch.float32)))  # fmt: skip
    for name, one, other, rounded in zip(("out", "dq", "dk", "dv"), actual, exact, same, strict=True):
        # a kernel in bfloat16 rounds P and dS too, as attention in bfloat16 does
        allowed = 2 * distance(rounded.to(dtype), other) + (4e-3 if dtype == torch.bfloat16 else 1e-6)
        assert distance(one, other) <= allowed, name
    if mask != "none":
        assert (actual[0][:, :, 5] == 0).all() and (actual[1][:, :, 5] == 0).all()


def fp4_results(x: fp4.Fp4Operands, mask: Tensor | None, scale: float, grad: Tensor, kind: torch.dtype) -> tuple:
    out, lse, out_hp = fp4.attention_fp4(x, mask, scale, kind)
    delta = (grad.to(kind) * out_hp).sum(-1)
    return out, *fp4.attention_fp4_backward(grad, x, mask, scale, delta, lse, kind)


def test_e4m3_has_no_launch_choice_before_sm_89():
    named = [name for name in LAUNCH if "fp8_values" in name]
    assert len(named) == 4 and all(set(LAUNCH[name]) == {89, 90, 100, 120} for name in named)


def test_tiles_of_keys_fit_the_number_formats():
    """FP4 weights are rounded in tiles of 64 keys, and a launch must neither split nor join them; so for queries."""
    for name, by_arch in LAUNCH.items():
        if name.startswith("fp4"):
            for by_dim in by_arch.values():
                assert all(choice.block_n == KEY_BLOCK and 128 % choice.block_m == 0 for choice in by_dim.values())
