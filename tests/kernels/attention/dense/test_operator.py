"""Dense attention on a CPU: the formula against the textbook, the fast path against the formula, the operator."""

import math

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.dense import oracle as reference
from diffusion_opt.kernels.attention.dense.operator import attention_op, dense_attention, dense_attention_with_lse

B, H, LQ, LK, D = 2, 3, 5, 4, 7


def qkv(dtype: torch.dtype = torch.float64, lk: int = LK) -> list[Tensor]:
    return [torch.randn(B, H, length, D, dtype=dtype, requires_grad=True) for length in (LQ, lk, lk)]


def open_mask() -> Tensor:
    """Query 1 of every head sees nothing, the others something."""
    mask = torch.rand(B, H, LQ, LK) > 0.4
    mask[..., 0] = True
    mask[:, :, 1] = False
    return mask


def bias_mask() -> Tensor:
    return torch.randn(1, H, LQ, LK, dtype=torch.float64).masked_fill(~open_mask()[:1], -math.inf)


MASKS = {
    "none": lambda: None,
    "bool": open_mask,
    "bias": bias_mask,
    "keys": lambda: torch.tensor([True, False, True, True]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_formula_is_the_textbook_one_row_by_row(kind):
    q, k, v = qkv()
    mask = MASKS[kind]()
    out, lse = reference.attention(q, k, v, mask, scale=0.3)
    full = None if mask is None else mask.expand(B, H, LQ, LK)
    for b, h, i in [(0, 0, 0), (1, 2, 1), (0, 1, 4)]:
        scores = torch.stack([0.3 * (q[b, h, i] * k[b, h, j]).sum() for j in range(LK)])
        if mask is not None and mask.dtype == torch.bool:
            scores = torch.stack([s if full[b, h, i, j] else s - math.inf for j, s in enumerate(scores)])
        elif mask is not None:
            scores = scores + full[b, h, i]
        total = scores.exp().sum()
        expected = (scores.exp().unsqueeze(-1) * v[b, h]).sum(0) / total if total > 0 else torch.zeros(D).double()
        torch.testing.assert_close(out[b, h, i], expected)
        torch.testing.assert_close(lse[b, h, i], total.log())


@pytest.mark.parametrize("kind", MASKS)
def test_fast_path_equals_the_formula_with_gradients(kind):
    q, k, v = qkv()
    mask, grad = MASKS[kind](), torch.randn(B, H, LQ, D, dtype=torch.float64)
    fast = dense_attention(q, k, v, mask, scale=0.3)
    formula, _ = reference.attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(fast, formula)
    for got, expected in zip(
        torch.autograd.grad(fast, (q, k, v), grad), torch.autograd.grad(formula, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", MASKS)
def test_gradient_of_output_and_lse(kind):
    q, k, v = qkv()
    mask = MASKS[kind]()

    def finite_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = dense_attention_with_lse(q, k, v, mask)
        return out, lse.masked_fill(lse == -math.inf, 0)

    torch.autograd.gradcheck(finite_outputs, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("kind", MASKS)
def test_operator_keeps_torchs_rules(kind):
    mask = MASKS[kind]()
    mask = None if mask is None else mask.expand(B, H, LQ, LK)
    torch.library.opcheck(attention_op, (*qkv(torch.float32), mask, 0.3))


@pytest.mark.parametrize("closed", [False, -math.inf, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
def test_a_query_without_keys_gives_zeros_and_no_gradient(closed):
    q, k, v = qkv(torch.float32)
    mask = torch.full((LQ, LK), True if closed is False else 0.0)
    mask[2] = closed
    out, lse = dense_attention_with_lse(q, k, v, mask)
    assert not out[:, :, 2].any() and (lse[:, :, 2] == -math.inf).all() and lse[:, :, :2].isfinite().all()
    for result in (out, dense_attention(q, k, v, mask)):
        assert not result[:, :, 2].any()
        grads = torch.autograd.grad(result.square().sum(), (q, k, v))
        assert not grads[0][:, :, 2].any() and all(grad.isfinite().all() and grad.any() for grad in grads)


def test_a_large_but_finite_bias_does_not_close_a_row():
    q, k, v = qkv(torch.float16)
    out = dense_attention(q, k, v, torch.full((1, LK), -1e5))
    torch.testing.assert_close(out, dense_attention(q, k, v), rtol=2e-2, atol=2e-2)
    assert out.dtype == torch.float16


def test_no_keys_and_no_queries():
    q, k, v = qkv(torch.float32, lk=0)
    out, lse = dense_attention_with_lse(q, k, v)
    assert not out.any() and (lse == -math.inf).all()
    assert not dense_attention(q, k, v).any()
    assert dense_attention(q[:, :, :0], k, v).shape == (B, H, 0, D)


def test_output_has_the_strides_of_the_queries():
    q = torch.randn(B, LQ, H, D).transpose(1, 2)
    _, k, v = qkv(torch.float32)
    out, lse = dense_attention_with_lse(q, k, v)
    assert out.stride() == q.stride() and lse.is_contiguous() and lse.dtype == torch.float32


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.randn(B, H, LK + 1, D)}, r"needs k and v of shape \(b, h, lk, d\)"),
        ({"k": torch.randn(B, 1, LK, D), "v": torch.randn(B, 1, LK, D)}, r"k \(2, 1, 4, 7\)"),
        ({"k": torch.randn(B, H, LK, D).half()}, "need one type"),
        ({"scale": -1.0}, "scale must be positive, got -1"),
        ({"mask": torch.randn(LQ, LK, requires_grad=True)}, "detach it"),
        ({"mask": torch.ones(LK, LQ, dtype=torch.bool)}, "does not broadcast"),
        ({"mask": torch.ones(1, B, H, LQ, LK, dtype=torch.bool)}, "does not broadcast"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = qkv(torch.float32)
    with pytest.raises(ValueError, match=message):
        dense_attention(**{"q": q, "k": k, "v": v, **change})
