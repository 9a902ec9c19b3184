"""The block-sparse kernels, forward and backward, against float64 under the same mask."""

import pytest
import torch
from kernels.accuracy import assert_at_most_twice_the_error_of_torch
from kernels.attention.sparse.sparse_masks import random_mask, to, window_mask
from torch import Tensor

from diffusion_opt.kernels.attention.dense import oracle as dense
from diffusion_opt.kernels.attention.softmax_tiles import fitted
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.operator import attention_op, block_sparse_attention
from diffusion_opt.kernels.launch import LaunchConfig

pytestmark = pytest.mark.interpreted

CASES = {  # (b, h, lq, lk, d), mask
    "ragged": ((1, 2, 100, 77, 24), lambda: random_mask(100, 77, 32, 32)),
    "each head": ((2, 2, 64, 96, 32), lambda: random_mask(64, 96, 32, 32, (2, 2))),
    "each batch entry": ((2, 1, 64, 96, 16), lambda: random_mask(64, 96, 32, 16, (2, 1))),
    "blocks of 96": ((1, 1, 130, 130, 16), lambda: random_mask(130, 130, 96, 96)),
    "tiles behind the end": ((1, 1, 100, 128, 16), lambda: random_mask(100, 128, 48, 96)),
    "tall blocks": ((1, 1, 128, 130, 40), lambda: random_mask(128, 130, 64, 16)),
    "head of 128": ((1, 1, 64, 128, 128), lambda: random_mask(64, 128, 32, 64)),
    "window with lengths": ((1, 1, 96, 96, 20), window_mask),
}


def qkv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    b, h, lq, lk, d = shape
    return [torch.randn(b, h, n, d).to(device, dtype).requires_grad_() for n in (lq, lk, lk)]


def results(function, inputs: list[Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Output, lse, and gradients for gradients arriving at both (0 at an lse of -inf)."""
    out, lse = function(*inputs)
    finite = lse.isfinite()
    total = (out * grads[0].to(out.dtype)).sum() + (lse[finite] * grads[1].to(lse.dtype)[finite]).sum()
    return [out, torch.where(finite, lse, 0.0), *torch.autograd.grad(total, inputs)]


def check(inputs: list[Tensor], mask: BlockMask) -> None:
    q, k, _ = inputs
    elements = mask.elements(q.shape[2], k.shape[2])
    grads = torch.randn_like(q), torch.randn(q.shape[:3], device=q.device)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = results(lambda *x: dense.attention(*x, elements), exact_inputs, grads)
    by_torch = results(lambda *x: dense.attention(*x, elements), inputs, grads)
    got = results(lambda *x: block_sparse_attention(*x, mask), inputs, grads)
    for ours, theirs, truth in zip(got, by_torch, exact, strict=True):
        assert_at_most_twice_the_error_of_torch(ours, theirs.to(ours.dtype), truth)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, device):
    shape, make = CASES[name]
    check(qkv(shape, torch.float32, device), to(make(), device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_short_types(dtype, device):
    shape, make = CASES["ragged"]
    check(qkv(shape, dtype, device), to(make(), device))


def test_strided_inputs_are_read_in_place_and_left_alone(device):
    """(b, l, h, d) in memory, q, k, v cut out of one tensor: the output is laid out like q."""
    mask = to(random_mask(64, 64, 32, 32), device)
    together = torch.randn(2, 64, 3, 2, 16, device=device)
    before = together.clone()
    q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    out, _ = block_sparse_attention(q, k, v, mask)
    again, _ = block_sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    assert torch.equal(out, again) and torch.equal(together, before)
    assert out.stride() == torch.empty_like(q).stride()


def test_rows_without_keys_give_zero_and_no_gradient(device):
    mask = to(random_mask(96, 96, 32, 32), device)
    q, k, v = qkv((1, 2, 96, 96, 16), torch.bfloat16, device)
    out, lse = block_sparse_attention(q, k, v, mask)
    assert not out[:, :, 32:64].any() and bool((lse[:, :, 32:64] == -torch.inf).all())
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dq[:, :, 32:64].any() and not dk[:, :, :32].any() and not dv[:, :, :32].any()
    assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))


def test_slots_without_a_token_are_not_read_as_keys(device):
    mask = to(window_mask(), device)
    q, k, v = qkv((1, 1, 96, 96, 16), torch.float32, device)
    slot = (torch.arange(mask.block_n, device=device) >= mask.lengths[:, None]).flatten()[:, None]
    loud = [torch.where(slot, 1e4, x.detach()) for x in (k, v)]
    assert torch.equal(block_sparse_attention(q, *loud, mask)[0], block_sparse_attention(q, k, v, mask)[0])


def test_the_order_of_a_list_hardly_matters_and_the_same_list_gives_the_same_bits(device):
    mask = to(random_mask(64, 160, 32, 32, share=1.0), device)
    q, k, v = qkv((1, 1, 64, 160, 16), torch.float32, device)
    out = block_sparse_attention(q, k, v, mask)[0]
    assert torch.equal(block_sparse_attention(q, k, v, mask)[0], out)
    row = mask.indices[..., :1, :].flip(-1)
    flipped = BlockMask(row.expand_as(mask.indices), mask.counts, mask.num_columns, 32, 32)
    torch.testing.assert_close(block_sparse_attention(q, k, v, flipped)[0], out, rtol=1e-5, atol=1e-6)


def test_shapes_and_strides_are_foretold(device):
    mask = to(random_mask(32, 48, 16, 16), device)
    inputs = qkv((1, 1, 32, 48, 16), torch.float32, device)
    torch.library.opcheck(attention_op, (*inputs, *mask.parts(), 0.5), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.wrong_shapes
def test_what_no_kernel_can_do_is_refused(device):
    q, k, v = qkv((1, 1, 32, 32, 300), torch.float32, device)
    with pytest.raises(ValueError, match="head dimension 300"):
        block_sparse_attention(q, k, v, to(random_mask(32, 32, 16, 16), device))
    q, k, v = qkv((1, 1, 60, 60, 16), torch.float32, device)
    with pytest.raises(ValueError, match="block sizes must be multiples of 16"):
        block_sparse_attention(q, k, v, to(random_mask(60, 60, 20, 20), device))
    with pytest.raises(ValueError, match=r"got torch.float64"):
        block_sparse_attention(q.double(), k.double(), v.double(), to(random_mask(60, 60, 32, 32), device))


@pytest.mark.parametrize(
    ("blocks", "owns_keys", "cut"),
    [
        ((128, 128), False, (128, 64, 8)),
        ((64, 128), False, (64, 64, 4)),
        ((64, 128), True, (64, 64, 8)),
        ((128, 96), True, (128, 32, 4)),
        ((16, 16), False, (16, 16, 4)),
    ],
)
def test_a_launch_choice_is_cut_to_the_blocks_of_a_mask(blocks, owns_keys, cut):
    """Fewer rows of what a program owns have fewer warps, but never less than the four of a group."""
    assert fitted(LaunchConfig(128, 64, 8, 2), *blocks, owns_keys) == LaunchConfig(*cut, 2)
