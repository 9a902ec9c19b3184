"""The kernels of adaptive normalization, forward and backward, against float64."""

import pytest
import torch
from kernels.accuracy import assert_at_most_twice_the_error_of_torch
from torch import Tensor

from diffusion_opt.kernels.fused.modulate import oracle as reference
from diffusion_opt.kernels.fused.modulate.operator import gated_modulate, modulate

pytestmark = pytest.mark.interpreted

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
B, L, C = 2, 19, 40  # more than one run of tokens, channels that are no power of two


def tensors(m: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shapes = [(B, L, C)] * 2 + [(B, m, C)] * 3
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def results(function, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((x * weight.to(x.dtype)).sum() for x, weight in zip(out, weights, strict=False))
    return [*out, *torch.autograd.grad(total, inputs)]


def check(inputs: list[Tensor], ours, theirs) -> None:
    weights = [torch.randn_like(inputs[0]) for _ in range(2)]
    exact = results(theirs, [x.detach().double().requires_grad_() for x in inputs], weights)
    by_torch, got = results(theirs, inputs, weights), results(ours, inputs, weights)
    for mine, other, truth in zip(got, by_torch, exact, strict=True):
        assert_at_most_twice_the_error_of_torch(mine, other, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("m", [1, L])
def test_gated(m, norm, dtype, device):
    inputs = tensors(m, DTYPES[dtype], device)
    check(inputs, lambda *x: gated_modulate(*x, norm), lambda *x: reference.gated_modulate(*x, norm, 1e-6))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("m", [1, L])
def test_plain(m, norm, device):
    x, _, _, scale, shift = tensors(m, torch.float32, device)
    check([x, scale, shift], lambda *x: modulate(*x, norm), lambda *x: reference.modulate(*x, norm, 1e-6))


def test_views_are_read_in_place_and_left_alone(device):
    """Hidden states cut out of joint text and image tokens, parameters out of one row."""
    joint, row = torch.randn(B, L + 6, C, device=device), torch.randn(B, 1, 3 * C, device=device)
    kept = joint.clone()
    x, y, (gate, scale, shift) = joint[:, 6:], torch.randn(B, C, L, device=device).mT, row.chunk(3, dim=-1)
    got = gated_modulate(x, y, gate, scale, shift)
    for ours, theirs in zip(got, reference.gated_modulate(x, y, gate, scale, shift, "layer", 1e-6), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(joint, kept)


def test_what_no_kernel_can_do_is_refused(device):
    x, row = torch.randn(1, 1, 20000, device=device), torch.zeros(1, 1, 20000, device=device)
    with pytest.raises(ValueError, match="at most 16384 channels, got 20000"):
        modulate(x, row, row)
    with pytest.raises(ValueError, match="convert float64"):
        modulate(x.double(), row, row)
