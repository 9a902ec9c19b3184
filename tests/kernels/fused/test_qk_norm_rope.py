"""Norm and rotation equal diffusers' own, in each family's convention; gradients and kernels equal the oracle's."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoRotaryPosEmbed,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn

from diffusion_opt.kernels.fused.qk_norm_rope import oracle as reference
from diffusion_opt.kernels.fused.qk_norm_rope.operator import (
    norm_rope_op,
    qk_norm_rope,
    qk_norm_rope_quantized,
    qk_norm_rope_with_mean,
)
from diffusion_opt.kernels.fused.qk_norm_rope.oracle import Rotation, flux2_rotation, ltx2_rotation, wan_rotation
from diffusion_opt.kernels.quantizers.operator import quantize_tokens
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS, smoothing_mean

B, H, L, D = 2, 3, 100, 24


def norm(size: int) -> nn.RMSNorm:
    layer = nn.RMSNorm(size, eps=1e-6)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    return layer


def heads(dtype: torch.dtype = torch.float32, device="cpu") -> Tensor:
    """A view of (b, l, h, d), as `to_q(x).unflatten(2, (heads, -1)).transpose(1, 2)` gives it."""
    return torch.randn(B, L, H, D).to(dtype).to(device).transpose(1, 2)


def some_rotation(pairs: str, device="cpu") -> Rotation:
    angle = torch.randn(B, 1, L, D // 2).to(device)
    return Rotation(angle.cos(), angle.sin(), pairs)


@torch.no_grad()
def test_flux2_as_in_its_attention():
    x, layer = heads(), norm(D)
    ids = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (1, 10, 10, 1)), indexing="ij"), -1).flatten(0, 3)
    tables = Flux2PosEmbed(theta=2000, axes_dim=[6, 6, 6, 6])(ids)
    expected = apply_rotary_emb(layer(x.transpose(1, 2)), tables, sequence_dim=1).transpose(1, 2)
    actual = qk_norm_rope(x, layer.weight, flux2_rotation(*tables))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_wan_as_in_its_attention(monkeypatch):
    """Through Wan's own processor: what reaches attention is what we compute."""
    module = WanAttention(H * D, heads=H, dim_head=D, eps=1e-6, processor=WanAttnProcessor())
    nn.init.uniform_(module.norm_k.weight, 0.5, 1.5)
    tables = WanRotaryPosEmbed(D, (1, 1, 1), 64)(torch.zeros(1, 1, 4, 5, 5))
    seen = {}

    def keep(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        seen["key"] = key
        return value

    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", keep)
    hidden = torch.randn(B, L, H * D)
    module(hidden, rotary_emb=tables)
    x = module.to_k(hidden).unflatten(2, (H, -1)).transpose(1, 2)
    actual = qk_norm_rope(x, module.norm_k.weight, wan_rotation(*tables))
    torch.testing.assert_close(actual.transpose(1, 2), seen["key"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "apply"), [("interleaved", apply_interleaved_rotary_emb), ("split", apply_split_rotary_emb)]
)
def test_ltx2_as_in_its_attention(kind, apply):
    embed = LTX2AudioVideoRotaryPosEmbed(dim=H * D, rope_type=kind, num_attention_heads=H)
    tables = embed(embed.prepare_video_coords(B, 4, 5, 5, device="cpu"))
    x, layer = heads(), norm(H * D)
    flat = apply(layer(x.transpose(1, 2).flatten(2)), tables)
    actual = qk_norm_rope(x, layer.weight, ltx2_rotation(*tables, H))
    torch.testing.assert_close(actual.transpose(1, 2).flatten(2), flat, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_bfloat16_is_rounded_once():
    x, layer, rotation = heads(torch.bfloat16), norm(D), some_rotation("neighbors")
    exact = reference.norm_rope(x.double(), layer.weight.double(), rotation, 1e-6)
    assert torch.equal(qk_norm_rope(x, layer.weight, rotation), exact.bfloat16())


@pytest.mark.parametrize("width", [D, H * D])
@pytest.mark.parametrize("pairs", ["neighbors", "halves", None])
def test_gradient_is_autograds(pairs, width):
    x, weight = heads().double().requires_grad_(), torch.rand(width, dtype=torch.float64, requires_grad=True)
    rotation = None if pairs is None else some_rotation(pairs)
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(reference.norm_rope(x, weight, rotation, 1e-6), (x, weight), grad)
    actual = torch.autograd.grad(qk_norm_rope(x, weight, rotation), (x, weight), grad)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_operator_knows_its_shapes_and_gradients():
    cos, sin, pairs = some_rotation("halves")
    arguments = (heads().requires_grad_(), torch.rand(D, requires_grad=True), cos, sin, pairs, 1e-6, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(norm_rope_op, arguments, test_utils=checks)


def test_bad_arguments_are_named():
    x, rotation = heads(), some_rotation("halves")
    with pytest.raises(ValueError, match=r"24 numbers .* or 72 .* got 48"):
        qk_norm_rope(x, torch.ones(48), rotation)
    with pytest.raises(ValueError, match="angles of shape"):
        qk_norm_rope(x[:, :, :50], torch.ones(D), rotation)
    with pytest.raises(ValueError, match="eps must be positive"):
        qk_norm_rope(x, torch.ones(D), rotation, eps=0.0)


def test_smoothing_with_the_mean_of_the_step_before():
    """The mean that comes out is that of the result, and any mean may go in."""
    x, weight, rotation = heads(), torch.rand(D), some_rotation("neighbors")
    y, mean = qk_norm_rope_with_mean(x, weight, rotation)
    torch.testing.assert_close(mean, smoothing_mean(y))
    codes, own = qk_norm_rope_quantized(x, weight, rotation, "int8", KEY_GROUPS["block"], 0.9 * mean)
    expected = quantize_tokens(y, "int8", KEY_GROUPS["block"], 0.9 * mean)
    assert torch.equal(codes.codes, expected.codes) and torch.equal(codes.scales, expected.scales)
    torch.testing.assert_close(own, mean)


@pytest.mark.interpreted
@pytest.mark.parametrize("width", [D, H * D])
@pytest.mark.parametrize("pairs", ["neighbors", "halves", None])
def test_kernel_against_the_oracle(pairs, width, device):
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        x, weight = heads(dtype, device), torch.rand(width).to(dtype).to(device)
        rotation = None if pairs is None else some_rotation(pairs, device)
        exact = reference.norm_rope(x.double(), weight.double(), rotation, 1e-6)
        y, mean = qk_norm_rope_with_mean(x, weight, rotation)
        assert y.stride() == x.stride()
        torch.testing.assert_close(y.double(), exact, rtol=bound, atol=1e-6)
        torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("pairs", ["neighbors", "halves"])
@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_quantizing_kernel_against_the_oracle(to, pairs, device):
    """Sums of squares in another order move numbers by a last bit, so a code may differ where one is at a tie."""
    x, weight, rotation = heads(device=device), torch.rand(D).to(device), some_rotation(pairs, device)
    exact = reference.norm_rope(x, weight, rotation, 1e-6)
    mean = smoothing_mean(exact)
    expected = quantize_tokens(exact, to, QUERY_GROUPS["thread"], mean)
    codes, own = qk_norm_rope_quantized(x, weight, rotation, to, QUERY_GROUPS["thread"], mean)
    torch.testing.assert_close(codes.scales, expected.scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-6)
    assert (codes.codes.float() != expected.codes.float()).float().mean() < 1e-3
