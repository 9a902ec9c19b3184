"""The oracles of low-precision attention: exact where rounding is, blind to what softmax is blind to, and in order."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.dense.oracle import attention
from diffusion_opt.kernels.attention.eight_bit import oracle as low_precision
from diffusion_opt.kernels.attention.fp4 import oracle as fp4
from diffusion_opt.kernels.attention.fp4.oracle import (
    NVFP4_MAX,
    attention_fp4,
    attention_fp4_backward,
    prepare,
    round_weights,
)
from diffusion_opt.kernels.quantizers.oracle import (
    KEY_BLOCK,
    KEY_GROUPS,
    QUERY_GROUPS,
    Quantized,
    quantize_channels,
    quantize_tokens,
    smoothing_mean,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(lq: int = 150, lk: int = 100, d: int = 32, bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; `bias` gives both q and k channels with a mean, as trained models have them."""
    q, k, v = normal(1, 2, lq, d), normal(1, 2, lk, d, seed=1), normal(1, 2, lk, d, seed=2)
    return q + 0.4 * bias * normal(d, seed=3), k + bias * normal(d, seed=4), v


def some_mask(lq: int, lk: int) -> Tensor:
    """Open for 7 of 10 pairs; query 5 sees nothing, query 6 only the last key."""
    mask = torch.rand(1, 1, lq, lk, generator=torch.Generator().manual_seed(5)) > 0.3
    mask[:, :, 5:7] = False
    mask[:, :, 6, -1] = True
    return mask


def run_8bit(q, k, v, mask=None, to="int8", granularity="block", values_in="fp16", smooth=True, tile=KEY_BLOCK):
    """Output and LSE in float64, the LSE as that of k itself."""
    scale, mean = q.shape[-1] ** -0.5, smoothing_mean(k) if smooth else None
    values = quantize_channels(v) if values_in == "fp8" else Quantized(v.half(), v.new_ones(1, 1, 1).float())
    codes = (
        quantize_tokens(q, to, QUERY_GROUPS[granularity]),
        quantize_tokens(k, to, KEY_GROUPS[granularity], mean),
    )
    out, lse = low_precision.attention_8bit(*codes, values, mask, scale, granularity, values_in, tile, torch.float64)
    return out, lse if mean is None else lse + scale * (q @ mean.double()[..., None])[..., 0]


def error(out: Tensor, exact: Tensor) -> float:
    return ((out - exact).abs().sum() / exact.abs().sum()).item()


@pytest.mark.parametrize("granularity", ["block", "thread"])
def test_integers_are_exact(granularity):
    """Codes that need no rounding give dense attention, up to the float16 of the weights."""
    q, k = (normal(1, 2, n, 32, seed=n).mul(20).round().clamp(-127, 127) for n in (150, 100))
    q[..., 0], k[..., 0] = 127, 127
    v = normal(1, 2, 100, 32).half().double()
    out, lse = run_8bit(q, k, v, granularity=granularity, smooth=False)
    exact, exact_lse = attention(q, k, v)
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(150, 100), (1, 65), (77, 7)])
@pytest.mark.parametrize("mask", ["none", "bool", "bias", "keys"])
@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4"])
def test_every_precision_serves_masks_and_ragged_lengths(precision, mask, shape):
    q, k, v = operands(*shape)
    opened = some_mask(150, 100)[..., : shape[0], : shape[1]]
    masks = {"none": None, "bool": opened, "keys": opened[:, :, :1].float().log()}
    masks["bias"] = torch.where(opened, normal(1, 2, *shape, seed=6), -torch.inf)
    exact, exact_lse = attention(q, k, v, masks[mask])
    if precision == "nvfp4":
        out, lse, _ = attention_fp4(prepare(q, k, v, "none"), masks[mask], 32**-0.5, torch.float64)
    else:
        out, lse = run_8bit(q, k, v, masks[mask], to=precision, values_in="fp16" if precision == "int8" else "fp8")
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    bound = {"int8": 0.03, "fp8": 0.09, "nvfp4": 0.35}[precision]
    assert error(out, exact) < bound
    assert (lse - exact_lse)[~empty].abs().max() < 10 * bound


def test_smoothing_k_is_blind_to_a_shift_of_all_keys():
    q, k, v = operands()
    shifted = k + 16 * normal(32, seed=9)
    one, other = run_8bit(q, k, v), run_8bit(q, shifted, v)
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=2e-3)  # the shift itself rounds a few codes differently
    exact, exact_lse = attention(q, shifted, v)
    torch.testing.assert_close(other[1], exact_lse, rtol=0, atol=0.02)
    assert error(run_8bit(q, shifted, v, smooth=False)[0], exact) > 4 * error(other[0], exact)


def test_fp8_weights_depend_on_the_tiles_they_are_met_in():
    """Why the oracle walks tiles: weights are rounded relative to the largest score so far."""
    q, k, v = operands()
    one, other = (run_8bit(3 * q, k, v, values_in="fp8", tile=tile)[0] for tile in (32, 64))
    assert not torch.allclose(one, other, rtol=0, atol=1e-6)
    assert error(one, other) < 0.03


def test_two_level_weights_do_not_depend_on_the_running_maximum():
    scores = 3 * normal(64, KEY_BLOCK)
    local = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = round_weights(local / NVFP4_MAX)  # one level: NVFP4 of the weights as they are
    for shift, least in ((2**-1.3, 0.2), (2**-9.0, 0.9)):
        other = round_weights(local * shift / NVFP4_MAX) / shift
        seen = (rounded > 0) | (other > 0)
        assert ((other - rounded).abs() > 1e-9)[seen].double().mean() > least
    q, k, v = operands()
    bias = torch.linspace(-40, 40, 150, dtype=torch.float64)[None, None, :, None]
    plain, _, _ = attention_fp4(prepare(q, k, v, "k"), None, 32**-0.5, torch.float64)
    shifted, _, _ = attention_fp4(prepare(q, k, v, "k"), bias, 32**-0.5, torch.float64)
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-12)


def test_rounded_weights_fill_the_format():
    rounded = round_weights(torch.linspace(0, 1, KEY_BLOCK, dtype=torch.float64)[None])
    assert rounded.amax() == NVFP4_MAX and rounded.amin() == 0


def test_accuracy_is_in_order():
    """INT8 before FP8 before FP4; under channel bias each step of smoothing helps, without bias smoothing is idle."""
    errors = {}
    for name, bias in (("plain", 0.0), ("biased", 4.0)):
        q, k, v = operands(256, 256, 64, bias)
        exact, _ = attention(q, k, v)
        for smooth in (False, True):
            errors[name, "int8", smooth] = error(run_8bit(q, k, v, smooth=smooth)[0], exact)
            errors[name, "int8 fp8", smooth] = error(run_8bit(q, k, v, values_in="fp8", smooth=smooth)[0], exact)
            errors[name, "fp8", smooth] = error(run_8bit(q, k, v, to="fp8", values_in="fp8", smooth=smooth)[0], exact)
        for smoothing in ("none", "k", "qk"):
            out, _, _ = attention_fp4(prepare(q, k, v, smoothing), None, 64**-0.5, torch.float64)
            errors[name, "nvfp4", smoothing] = error(out, exact)
    for name in ("plain", "biased"):
        ordered = [errors[name, "int8", True], errors[name, "int8 fp8", True], errors[name, "nvfp4", "qk"]]
        assert ordered == sorted(ordered) and errors[name, "int8 fp8", True] < errors[name, "fp8", True]
    assert errors["biased", "int8", True] < 0.7 * errors["biased", "int8", False]
    assert errors["biased", "fp8", True] < 0.7 * errors["biased", "fp8", False]
    assert errors["biased", "nvfp4", "k"] < 0.7 * errors["biased", "nvfp4", "none"]
    assert errors["biased", "nvfp4", "qk"] < 0.9 * errors["biased", "nvfp4", "k"]
    assert abs(errors["plain", "nvfp4", "qk"] / errors["plain", "nvfp4", "none"] - 1) < 0.1


def gradients(smoothing: str, mask: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
    """dq, dk, dv by autograd through the roundings, by the rule, and by the rule with delta from O."""
    q, k, v = (x.requires_grad_() for x in operands(bias=1.0))
    grad, scale = normal(*q.shape, seed=7), q.shape[-1] ** -0.5
    out = fp4.straight_through_attention(q, k, v, mask, scale, smoothing)
    results = {"autograd": torch.autograd.grad(out, (q, k, v), grad)}
    with torch.no_grad():
        x = prepare(q, k, v, smoothing)
        again, lse, out_hp = attention_fp4(x, mask, scale, torch.float64)
        torch.testing.assert_close(again, out.detach(), rtol=0, atol=1e-12)
        for name, source in (("rule", out_hp), ("delta from O", again)):
            delta = (grad * source).sum(-1)
            results[name] = attention_fp4_backward(grad, x, mask, scale, delta, lse, torch.float64)
    return results


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("smoothing", ["none", "k", "qk"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_rule_is_autograd_through_the_roundings(smoothing, masked):
    results = gradients(smoothing, some_mask(150, 100) if masked else None)
    for actual, expected in zip(results["rule"], results["autograd"], strict=True):
        assert distance(actual, expected) < 1e-12


@pytest.mark.parametrize("smoothing", ["none", "k", "qk"])
def test_delta_from_the_rounded_output_is_wrong(smoothing):
    results = gradients(smoothing)
    dq, dk, dv = (distance(*pair) for pair in zip(results["delta from O"], results["autograd"], strict=True))
    assert dq > 0.01 and dk > 0.01 and dv < 1e-12


def test_gradient_of_the_keys_does_not_see_a_shift():
    """Softmax is blind to a vector added to all keys, so their gradients cancel: the mean may count as a constant."""
    for smoothing in ("k", "qk"):
        _, dk, _ = gradients(smoothing)["rule"]
        assert dk.sum(2).abs().max() < 1e-9 * dk.abs().max()
