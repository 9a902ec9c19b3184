"""Adaptive normalization by its reference: equal to diffusers' blocks, and to its own gradient."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from torch import Tensor, nn

from diffusion_opt.kernels.fused.modulate import oracle as reference
from diffusion_opt.kernels.fused.modulate.operator import gated_modulate, gated_modulate_op, modulate, modulate_op

B, L, C = 2, 5, 7


def tensors(m: int, number: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, y of (b, l, c), then parameters of (b, m, c), all to be differentiated."""
    shapes = [(B, L, C)] * 2 + [(B, m, C)] * (number - 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_equals_the_code_of_flux2():
    """The lines of Flux2TransformerBlock between attention and MLP, with parameters cut out of one tensor."""
    x, y = torch.randn(B, L, C), torch.randn(B, L, C)
    (shift_1, scale_1, gate_1), (shift_2, scale_2, gate_2) = Flux2Modulation.split(torch.randn(B, 6 * C), 2)
    norm = nn.LayerNorm(C, elementwise_affine=False, eps=1e-6)
    torch.testing.assert_close(modulate(x, scale_1, shift_1), (1 + scale_1) * norm(x) + shift_1)
    hidden, modulated = gated_modulate(x, y, gate_1, scale_2, shift_2)
    expected = x + gate_1 * y
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(modulated, norm(expected) * (1 + scale_2) + shift_2)
    assert gate_2.stride(0) == 6 * C  # they were views indeed


def test_rms_norm_is_that_of_torch():
    x, scale, shift = torch.randn(B, L, C), torch.randn(B, 1, C), torch.randn(B, 1, C)
    expected = torch.nn.functional.rms_norm(x, (C,), eps=1e-5) * (1 + scale) + shift
    torch.testing.assert_close(modulate(x, scale, shift, norm="rms", eps=1e-5), expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("m", [1, L])
def test_gradients_equal_autograd(m, norm):
    x, _, _, scale, shift = inputs = tensors(m, 5)
    weights = torch.randn(2, B, L, C, dtype=torch.float64)

    def gradients(function, *arguments: Tensor) -> tuple[Tensor, ...]:
        results = function(*arguments, norm, 1e-6)
        results = results if isinstance(results, tuple) else (results,)
        total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=False))
        return torch.autograd.grad(total, arguments)

    for ours, theirs, arguments in (
        (modulate, reference.modulate, (x, scale, shift)),
        (gated_modulate, reference.gated_modulate, inputs),
    ):
        for got, expected in zip(gradients(ours, *arguments), gradients(theirs, *arguments), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("m", [1, L])
def test_registration(m):
    x, _, _, scale, shift = inputs = tensors(m, 5, torch.float32)
    torch.library.opcheck(modulate_op, (x, scale, shift, "layer", 1e-6))
    torch.library.opcheck(gated_modulate_op, (*inputs, "rms", 1e-6))


def test_zero_parameters_are_the_norm_alone_and_a_zero_gate_changes_nothing():
    x, y = torch.randn(B, L, C), torch.randn(B, L, C)
    zero = torch.zeros(B, 1, C)
    hidden, modulated = gated_modulate(x, y, zero, zero, zero)
    assert torch.equal(hidden, x)
    torch.testing.assert_close(modulated, torch.nn.functional.layer_norm(x, (C,), eps=1e-6))


def test_short_types_are_rounded_once():
    """bfloat16 in PyTorch rounds after each of the six operations; here the result is the rounded exact one."""
    x, y, gate, scale, shift = (t.detach().bfloat16() for t in tensors(1, 5))
    hidden, modulated = gated_modulate(x, y, gate, scale, shift)
    assert hidden.dtype == modulated.dtype == torch.bfloat16
    exact = x.double() + gate.double() * y.double()
    torch.testing.assert_close(hidden, exact.bfloat16(), rtol=0, atol=0)
    exact = reference.modulate(hidden.double(), scale.double(), shift.double(), "layer", 1e-6)
    torch.testing.assert_close(modulated, exact.bfloat16(), rtol=2**-8, atol=0)


def test_wrong_arguments_are_refused():
    x, y, gate, scale, shift = tensors(1, 5)
    with pytest.raises(ValueError, match="norm must be one of layer, rms, got 'batch'"):
        modulate(x, scale, shift, norm="batch")
    with pytest.raises(ValueError, match=r"have all \(2, 1, 7\) or all \(2, 5, 7\)"):
        gated_modulate(x, y, *(row.repeat(1, 2, 1) for row in (gate, scale, shift)))
    with pytest.raises(ValueError, match="x and y are alike"):
        gated_modulate(x, y.float(), gate, scale, shift)
