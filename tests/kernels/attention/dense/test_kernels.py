"""The dense kernels, forward and backward, against float64: ragged and adversarial shapes, masks, strides, limits."""

import math

import pytest
import torch
from kernels.accuracy import assert_at_most_twice_the_error_of_torch
from torch import Tensor

from diffusion_opt.kernels.attention.dense import oracle as reference
from diffusion_opt.kernels.attention.dense.operator import attention_op, dense_attention, dense_attention_with_lse

pytestmark = pytest.mark.interpreted

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = {  # (b, h, lq, lk, d)
    "several tiles": (1, 1, 150, 77, 32),
    "odd heads": (2, 1, 33, 130, 40),
    "head of 72": (1, 1, 65, 70, 72),
    "head of 128": (1, 1, 40, 100, 128),
    "one query": (1, 2, 1, 70, 16),
    "whole tiles": (1, 1, 128, 128, 64),
    "tiny": (1, 3, 2, 3, 5),
}


def qkv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, size: float = 1.0) -> list[Tensor]:
    b, h, lq, lk, d = shape
    lengths = (lq, lk, lk)
    return [(size * torch.randn(b, h, n, d)).to(device, dtype).requires_grad_() for n in lengths]


def make_mask(kind: str, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    b, h, lq, lk, _ = shape
    if kind == "none":
        return None
    if kind == "bias":  # per head and key, one key closed: LTX-2's padding
        mask = torch.randn(1, h, 1, lk)
        mask[..., lk // 2] = -math.inf
        return mask.to(device)
    mask = torch.rand(b, 1, lq, lk) > 0.5
    mask[:, :, lq // 2] = lq == 1
    return mask.to(device)


def outputs_and_gradients(function, inputs: list[Tensor], mask: Tensor | None, grad: Tensor) -> list[Tensor]:
    out = function(*inputs, mask)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def check(inputs: list[Tensor], mask: Tensor | None) -> None:
    """Output and gradients at most twice as far from float64 as SDPA's in the same type; lse to float32."""
    grad = torch.randn_like(inputs[0])
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = outputs_and_gradients(lambda *a: reference.attention(*a)[0], exact_inputs, mask, grad)
    by_torch = outputs_and_gradients(reference.fast_attention, inputs, mask, grad)
    got = outputs_and_gradients(dense_attention, inputs, mask, grad)
    for ours, theirs, truth in zip(got, by_torch, exact, strict=True):
        assert_at_most_twice_the_error_of_torch(ours, theirs, truth)
    lse, exact_lse = dense_attention_with_lse(*inputs, mask)[1], reference.attention(*exact_inputs, mask)[1]
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_mask(shape, dtype, device):
    check(qkv(SHAPES[shape], DTYPES[dtype], device), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("shape", ["several tiles", "odd heads", "one query"])
def test_with_mask(shape, kind, dtype, device):
    check(qkv(SHAPES[shape], DTYPES[dtype], device), make_mask(kind, SHAPES[shape], device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_do_not_overflow(dtype, device):
    """Scores of thousands: softmax is nearly one-hot, and 2^score alone would be infinite."""
    check(qkv(SHAPES["odd heads"], DTYPES[dtype], device, size=30.0), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_is_copied(dtype, device):
    """The weight is 1 whatever the score, so the output is v and no gradient reaches q and k."""
    q, k, v = qkv((1, 2, 70, 1, 16), DTYPES[dtype], device)
    grad = torch.randn_like(q)
    out, grad_q, grad_k, grad_v = outputs_and_gradients(dense_attention, [q, k, v], None, grad)
    assert torch.equal(out, v.expand_as(out))
    torch.testing.assert_close(grad_v, grad.float().sum(2, keepdim=True).to(grad.dtype))
    for zero in (grad_q, grad_k):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-5)


def test_gradient_of_the_lse(device):
    inputs = qkv(SHAPES["odd heads"], torch.float32, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = dense_attention_with_lse(*inputs)
    exact_out, exact_lse = reference.attention(*exact_inputs)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    exact = torch.autograd.grad((exact_out, exact_lse), exact_inputs, (grad_out.double(), grad_lse.double()))
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-4, atol=1e-5)


def test_parts_merge_through_their_lse(device):
    """softmax over all keys is the lse-weighted mean of softmax over two halves: what ring attention relies on."""
    q, k, v = (x.detach() for x in qkv((1, 2, 40, 90, 32), torch.float32, device))
    whole, lse = dense_attention_with_lse(q, k, v)
    parts = [dense_attention_with_lse(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 37), slice(37, 90))]
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse)
    merged = sum(out * (part_lse - lse).exp().unsqueeze(-1) for out, part_lse in parts)
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize("closed", [False, -math.inf, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
def test_a_query_without_keys_gives_zeros_and_no_gradient(closed, device):
    inputs = qkv((1, 2, 70, 90, 16), torch.bfloat16, device)
    mask = torch.full((70, 90), True if closed is False else 0.0, device=device)
    mask[[2, 66]] = closed
    mask[5, :64] = closed  # nothing in the first tile, something in the second
    out, lse = dense_attention_with_lse(*inputs, mask)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for row in (2, 66):
        assert not out[:, :, row].any() and (lse[:, :, row] == -math.inf).all() and not grads[0][:, :, row].any()
    assert out[:, :, 5].any() and lse[:, :, 5].isfinite().all()
    assert all(x.isfinite().all() for x in (out, *grads))


def test_everything_closed_gives_zeros_everywhere(device):
    inputs = qkv((1, 1, 20, 70, 16), torch.bfloat16, device)
    out, lse = dense_attention_with_lse(*inputs, torch.zeros(1, 70, dtype=torch.bool, device=device))
    assert not out.any() and (lse == -math.inf).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), inputs))


def test_no_keys_and_no_queries(device):
    q, k, v = qkv((1, 2, 5, 0, 16), torch.float32, device)
    out, lse = dense_attention_with_lse(q, k, v)
    assert not out.any() and (lse == -math.inf).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    assert dense_attention(q[:, :, :0], k, v).shape == (1, 2, 0, 16)


@pytest.mark.parametrize("sizes", [(40,), (12, 1), (2, 1, 1, 40), (2, 12, 40)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_a_broadcast_mask_equals_its_copy_bit_for_bit(sizes, kind, device):
    inputs = qkv((2, 2, 12, 40, 16), torch.bfloat16, device)
    mask = torch.randn(sizes, device=device)
    mask = mask > 0 if kind == "bool" else mask
    grad = torch.randn_like(inputs[0])
    for one, other in zip(
        outputs_and_gradients(dense_attention, inputs, mask, grad),
        outputs_and_gradients(dense_attention, inputs, mask.expand(2, 2, 12, 40).contiguous(), grad),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["tokens first", "numbers first", "cut out of NaN"])
def test_strides_do_not_matter_and_inputs_are_not_touched(layout, device):
    inputs = qkv((1, 2, 40, 70, 40), torch.float16, device)
    if layout == "tokens first":
        views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    elif layout == "numbers first":
        views = [x.detach().mT.contiguous().mT for x in inputs]
    else:
        wide = [torch.full((1, 2, x.shape[2] + 9, 56), math.nan, dtype=x.dtype, device=device) for x in inputs]
        views = [whole[:, :, : x.shape[2], :40].copy_(x.detach()) for whole, x in zip(wide, inputs, strict=True)]
    views = [view.requires_grad_() for view in views]
    assert not any(view.is_contiguous() for view in views)
    grad = torch.randn_like(inputs[0])
    for one, other in zip(
        outputs_and_gradients(dense_attention, inputs, None, grad),
        outputs_and_gradients(dense_attention, views, None, grad.mT.contiguous().mT),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert all(torch.equal(view, x) for view, x in zip(views, inputs, strict=True))


def test_same_bits_every_time_and_for_each_item_alone(device):
    inputs = qkv((2, 2, 40, 70, 16), torch.float16, device)
    grad = torch.randn_like(inputs[0])
    both = outputs_and_gradients(dense_attention, inputs, None, grad)
    again = outputs_and_gradients(dense_attention, inputs, None, grad)
    alone = outputs_and_gradients(
        dense_attention, [x.detach()[1:, 1:].requires_grad_() for x in inputs], None, grad[1:, 1:]
    )
    for first, second, one in zip(both, again, alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first[1:, 1:], one)


@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
def test_operator_keeps_torchs_rules(kind, device):
    shape = (2, 3, 5, 4, 7)
    mask = make_mask(kind, shape, device)
    mask = None if mask is None else mask.expand(2, 3, 5, 4)
    torch.library.opcheck(attention_op, (*qkv(shape, torch.float32, device), mask, 0.3))


@pytest.mark.parametrize(
    ("dtype", "d", "message"), [(torch.float64, 16, "got torch.float64"), (torch.float32, 257, "257")]
)
def test_what_no_kernel_can_is_refused(dtype, d, message, device):
    with pytest.raises(ValueError, match=message):
        dense_attention(*qkv((1, 1, 4, 4, d), dtype, device))
