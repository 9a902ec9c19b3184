"""Attention in low precision: the kernels' bits, the gradient of the rounded function, and a switch that comes off."""

import copy
import dataclasses
import json

import pytest
import torch
from small_transformers import family_pass, family_pipeline, family_sample, small_transformer
from torch import Tensor, nn

from diffusion_opt.kernels.attention.eight_bit import fp8_attention, int8_attention
from diffusion_opt.kernels.attention.fp4 import fp4_attention
from diffusion_opt.kernels.diffusers_backend import attention_backend
from diffusion_opt.kernels.quantizers.oracle import (
    EIGHT_BIT_KEYS,
    KEY_GROUPS,
    QUERY_GROUPS,
    quantize_channels,
    quantize_tokens,
)
from diffusion_opt.quantization.attention.gradient import low_precision_attention
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention

FORMATS = ("int8", "fp8", "nvfp4")
FAMILIES = ("flux2", "ltx2", "wan")
KERNELS = {
    "int8": lambda *args, smooth: int8_attention(*args, smooth_k=smooth),
    "fp8": lambda *args, smooth: fp8_attention(*args, smooth_k=smooth),
    "nvfp4": lambda *args, smooth: fp4_attention(*args, smoothing="qk" if smooth else "none"),
}


def operands(lq: int = 20, lk: int = 130, d: int = 24) -> list[Tensor]:
    """q, k, v of two heads that require gradients; channels of the keys have a mean."""
    generator = torch.Generator().manual_seed(0)
    bias = 2 * torch.randn(d, generator=generator)
    q, k, v = (torch.randn(1, 2, length, d, generator=generator) for length in (lq, lk, lk))
    return [x.requires_grad_() for x in (q, k + bias, v)]


def some_mask(lq: int, lk: int) -> Tensor:
    """Closed for 3 of 10 pairs; query 5 sees nothing."""
    opened = torch.rand(1, 1, lq, lk, generator=torch.Generator().manual_seed(1)) > 0.3
    opened[:, :, 5] = False
    return opened


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def decoded(codes: Tensor, scales: Tensor, window: int) -> Tensor:
    return codes.float() * scales.repeat_interleave(window, -1)[..., : codes.shape[2], None]


def straight_through(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, format: str, smooth: bool) -> Tensor:
    """The 8-bit operation written out for autograd, tile by tile, each rounding as x + (Q(x) - x).detach()."""
    mean = k.mean(2, keepdim=True) if smooth else torch.zeros_like(k[:, :, :1])
    queries = decoded(*quantize_tokens(q.detach(), format, QUERY_GROUPS["block"]), 128)
    keys = decoded(*quantize_tokens(k.detach(), format, KEY_GROUPS["block"], mean.detach()[:, :, 0]), EIGHT_BIT_KEYS)
    values = v.half().float()
    if format == "fp8":
        codes = quantize_channels(v.detach())
        values = codes.codes.float() * codes.scales[:, :, None]
    scores = q.shape[-1] ** -0.5 * straight(q, queries) @ straight(k - mean.detach(), keys).mT
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0)
    peak = torch.full_like(scores[..., :1], -1e30)
    rounded, norm = torch.zeros_like(p), 0.0
    for start in range(0, k.shape[2], EIGHT_BIT_KEYS):
        tile = scores[..., start : start + EIGHT_BIT_KEYS].detach()
        new = torch.maximum(peak, tile.amax(-1, keepdim=True))
        weights, shrink, peak = (tile - new).exp(), (peak - new).exp(), new
        norm = norm * shrink + weights.sum(-1, keepdim=True)
        codes = weights.half().float() if format == "int8" else (448 * weights).to(torch.float8_e4m3fn).float() / 448
        rounded = rounded * shrink
        rounded[..., start : start + EIGHT_BIT_KEYS] = codes
    return straight(p, rounded / torch.where(norm == 0, 1, norm)) @ straight(v, values)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_the_forward_pass_has_the_bits_of_the_kernels(format, smooth):
    q, k, v = operands()
    mask = some_mask(20, 130)
    out = low_precision_attention(q, k, v, mask, 0.3, format=format, smooth=smooth)
    assert torch.equal(out, KERNELS[format](q, k, v, mask, 0.3, smooth=smooth))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_the_gradient_is_that_of_the_rounded_function(format, smooth, masked):
    tensors, mask = operands(), some_mask(20, 130) if masked else None
    grad_out = torch.randn(1, 2, 20, 24)
    expected = straight_through(*tensors, mask, format, smooth)
    want = torch.autograd.grad(expected, tensors, grad_out)
    out = low_precision_attention(*tensors, mask, format=format, smooth=smooth)
    assert distance(out, expected) < 2e-3  # a few weights lie on the edge between two codes
    for got, wanted in zip(torch.autograd.grad(out, tensors, grad_out), want, strict=True):
        assert distance(got, wanted) < (2e-5 if format == "int8" else 2e-3)
        assert got.isfinite().all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_the_usual_gradient_of_attention_is_another_one(format):
    tensors, grad_out = operands(), torch.randn(1, 2, 20, 24)
    out = low_precision_attention(*tensors, format=format)
    ours = torch.autograd.grad(out, tensors, grad_out)
    usual = torch.autograd.grad(nn.functional.scaled_dot_product_attention(*tensors), tensors, grad_out)
    assert all(0.003 < distance(one, other) < 0.2 for one, other in zip(ours, usual, strict=True))


def test_smoothing_helps_where_keys_have_a_mean():
    q, k, v = (x.detach() for x in operands())
    exact = nn.functional.scaled_dot_product_attention(q, k, v)
    for format in FORMATS:
        smoothed, rough = (
            distance(low_precision_attention(q, k, v, format=format, smooth=s), exact) for s in (True, False)
        )
        assert smoothed < rough


def outputs(transformer: nn.Module, time: float = 0.4, family: str = "flux2") -> tuple[Tensor, ...]:
    return tuple(out for out in transformer(**family_pass(family, time)) if out is not None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_switched_and_given_back(family, format):
    pipe = family_pipeline(family, blocks=2)
    with torch.no_grad():
        want = outputs(pipe.transformer, family=family)
        technique = LowPrecisionAttention(format)
        assert technique.apply(pipe) is pipe
        got = outputs(pipe.transformer, family=family)
        assert all(0 < distance(one, other) < 0.2 for one, other in zip(got, want, strict=True))
        technique.remove(pipe)
        assert all(torch.equal(*pair) for pair in zip(outputs(pipe.transformer, family=family), want, strict=True))
    processors = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    assert not any("_attention_backend" in vars(processor) for processor in processors)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_the_scoped_backend_made_to_stay(format):
    pipe = family_pipeline("flux2", blocks=2)
    with attention_backend(pipe, f"diffopt-{format}", keep_dense=(1, 0)):
        want = family_sample(pipe, steps=2)
    LowPrecisionAttention(format, keep_dense=(1, 0)).apply(pipe)
    assert torch.equal(family_sample(pipe, steps=2), want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_all_weights_that_they_reach_in_dense_attention(family, format):
    transformer = small_transformer(family, blocks=2).train()
    sum(out.square().mean() for out in outputs(transformer, family=family)).backward()
    dense = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad(set_to_none=True)
    pipe = family_pipeline(family, blocks=2)
    pipe.transformer = transformer
    LowPrecisionAttention(format).apply(pipe)
    sum(out.square().mean() for out in outputs(transformer, family=family)).backward()
    assert {name for name, p in transformer.named_parameters() if p.grad is not None} == dense.keys()
    together = [torch.cat([g.flatten() for g in grads]) for grads in (dense.values(), grads_of(transformer, dense))]
    assert 0 < distance(together[1], together[0]) < 0.3


def grads_of(transformer: nn.Module, names: dict[str, Tensor]) -> list[Tensor]:
    return [transformer.get_parameter(name).grad for name in names]


@torch.no_grad()
def test_passes_outside_of_its_times_have_the_bits_of_the_stock_model():
    pipe = family_pipeline("ltx2", blocks=1)
    stock = {time: outputs(pipe.transformer, time, "ltx2") for time in (0.9, 0.5, 0.1)}
    LowPrecisionAttention("nvfp4", times=(0.2, 0.8)).apply(pipe)
    same = {t: torch.equal(outputs(pipe.transformer, t, "ltx2")[0], want[0]) for t, want in stock.items()}
    assert same == {0.9: True, 0.5: False, 0.1: True}
    assert torch.equal(outputs(pipe.transformer, 0.9, "ltx2")[0], stock[0.9][0])  # and on, off again


def test_a_batch_of_several_times_is_refused_where_times_matter():
    pipe = family_pipeline("flux2", blocks=2)
    LowPrecisionAttention("int8", times=(0.2, 0.8)).apply(pipe)
    given = family_pass("flux2", 0.4) | {"timestep": torch.tensor([0.4, 0.9])}
    with pytest.raises(ValueError, match="the samples of this one are at several"):
        pipe.transformer(**given)


@torch.no_grad()
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.5)])
def test_copies_have_a_switch_of_their_own(times):
    pipe = family_pipeline("flux2", blocks=2)
    technique = LowPrecisionAttention("nvfp4", times=times)
    want = outputs(pipe.transformer)
    technique.apply(pipe)
    twin = copy.deepcopy(pipe)
    low = outputs(pipe.transformer)
    assert torch.equal(outputs(twin.transformer)[0], low[0])
    technique.remove(twin)
    assert torch.equal(outputs(twin.transformer)[0], want[0])
    assert torch.equal(outputs(pipe.transformer)[0], low[0]) and not torch.equal(low[0], want[0])


def test_what_was_chosen_before_is_given_back():
    pipe = family_pipeline("flux2", blocks=2)
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.set_attention_backend("_native_math")
    technique = LowPrecisionAttention("int8")
    technique.apply(pipe)
    assert attention.processor._attention_backend == "diffopt-trainable-int8"
    technique.remove(pipe)
    assert attention.processor._attention_backend == "_native_math"


def test_settings_round_trip_through_json_and_describe_themselves():
    technique = LowPrecisionAttention("fp8", smooth=False, keep_dense=[2, 1], times=[0.25, 1])
    assert LowPrecisionAttention(**json.loads(json.dumps(dataclasses.asdict(technique)))) == technique
    assert technique.describe() == (
        "FP8 attention without smoothing, 2 first and 1 last blocks dense, for times 0.25 to 1"
    )
    assert LowPrecisionAttention().describe() == "NVFP4 attention"


def test_what_it_cannot_do_is_refused_and_changes_nothing():
    pipe = family_pipeline("flux2", blocks=2)
    with pytest.raises(ValueError, match=r"times must be \(lowest, highest\) within \[0, 1\], got \(0.8, 0.2\)"):
        LowPrecisionAttention(times=(0.8, 0.2))
    with pytest.raises(ValueError, match=r"keep_dense must be two numbers, got \(1, 1, 1\)"):
        LowPrecisionAttention(keep_dense=(1, 1, 1))
    with pytest.raises(ValueError, match=r"keep_dense=\(1, 1\) must leave some of the 2 blocks"):
        LowPrecisionAttention(keep_dense=(1, 1)).apply(pipe)
    with pytest.raises(ValueError, match="does not send its attention"):
        LowPrecisionAttention().apply(family_pipeline("sd3", blocks=1))
    with pytest.raises(ValueError, match="it was not applied"):
        LowPrecisionAttention().remove(pipe)
    LowPrecisionAttention("int8").apply(pipe)
    with pytest.raises(ValueError, match="in low precision already"):
        LowPrecisionAttention().apply(pipe)


@pytest.mark.wrong_shapes
def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="the format of attention must be one of int8, fp8, nvfp4, got 'int4'"):
        LowPrecisionAttention("int4")
