"""Block-sparse attention by its reference: dense attention under the mask, its gradients, and what must not matter."""

import pytest
import torch
from kernels.attention.sparse.sparse_masks import random_mask, window_mask
from torch import Tensor

from diffusion_opt.kernels.attention.dense import oracle as dense
from diffusion_opt.kernels.attention.sparse.coarse_to_fine import coarse_to_fine_attention
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.operator import attention_op, block_sparse_attention
from diffusion_opt.kernels.attention.sparse.packing import TokenTiles, token_tiles


def qkv(b: int = 2, h: int = 3, lq: int = 37, lk: int = 50, d: int = 5, dtype=torch.float64) -> list[Tensor]:
    return [torch.randn(b, h, n, d, dtype=dtype, requires_grad=True) for n in (lq, lk, lk)]


def full(lq: int, lk: int, block_m: int, block_n: int) -> BlockMask:
    return BlockMask.from_dense(torch.ones(1, 1, -(-lq // block_m), -(-lk // block_n)).bool(), block_m, block_n)


MASKS = {
    "shared": (37, 50, lambda: random_mask(37, 50, 8, 12)),
    "each head": (37, 50, lambda: random_mask(37, 50, 16, 8, (2, 3))),
    "each batch entry": (37, 50, lambda: random_mask(37, 50, 8, 24, (2, 1))),
    "window with lengths": (96, 96, window_mask),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_dense_attention_under_the_mask(name):
    lq, lk, make = MASKS[name]
    mask, inputs = make(), qkv(lq=lq, lk=lk)
    assert 0 < mask.density < 0.9
    out, lse = block_sparse_attention(*inputs, mask)
    expected, expected_lse = dense.attention(*inputs, mask.elements(lq, lk))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    finite = expected_lse.isfinite()
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)[finite]

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * weight).sum() + (lse[finite] * weight_lse).sum(), inputs)

    for got, wanted in zip(gradients(out, lse), gradients(expected, expected_lse), strict=True):
        torch.testing.assert_close(got, wanted)


def test_gradient_and_registration():
    mask = random_mask(20, 21, 8, 8)
    inputs = qkv(1, 2, 20, 21, 3)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, mask)[0], inputs, fast_mode=True)
    torch.library.opcheck(attention_op, (*qkv(1, 2, 20, 21, 3, torch.float32), *mask.parts(), 0.5))
    torch.library.opcheck(attention_op, (*qkv(1, 2, 96, 96, 3, torch.float32), *window_mask().parts(), 0.5))


def test_a_full_mask_is_dense_attention():
    inputs = qkv(dtype=torch.float32)
    out, lse = block_sparse_attention(*inputs, full(37, 50, 8, 16))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*inputs))
    torch.testing.assert_close(lse, dense.attention(*inputs)[1])


def test_rows_without_keys_give_zero_and_no_gradient():
    mask, (q, k, v) = random_mask(37, 50, 8, 12), qkv()
    out, lse = block_sparse_attention(q, k, v, mask)
    assert not out[:, :, 8:16].any() and bool((lse[:, :, 8:16] == -torch.inf).all())
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dq[:, :, 8:16].any() and not dk[:, :, :12].any() and not dv[:, :, :12].any()
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in (dq, dk, dv))


def test_the_order_of_blocks_does_not_matter():
    """Permute the blocks of keys, and the columns of the mask with them."""
    q, k, v = qkv(lk=48)
    table = random_mask(37, 48, 8, 12).dense()
    order = torch.tensor([2, 0, 3, 1])
    moved = [x.unflatten(2, (4, 12))[:, :, order].flatten(2, 3) for x in (k, v)]
    out, lse = block_sparse_attention(q, k, v, BlockMask.from_dense(table, 8, 12))
    again, lse_again = block_sparse_attention(q, *moved, BlockMask.from_dense(table[..., order], 8, 12))
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(lse_again, lse)


def test_keys_outside_the_mask_are_not_read():
    mask, (q, k, v) = window_mask(), qkv(lq=96, lk=96)
    slot = torch.arange(mask.block_n) >= mask.lengths[:, None]
    poisoned = [x.detach().masked_fill(slot.flatten()[:, None], torch.nan) for x in (k, v)]
    out, _ = block_sparse_attention(q, *poisoned, mask)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, mask)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_and_layout_are_those_of_q(dtype):
    q, k, v = (torch.randn(2, n, 3, 8).to(dtype).transpose(1, 2) for n in (37, 50, 50))
    out, lse = block_sparse_attention(q, k, v, random_mask(37, 50, 8, 12))
    assert out.dtype == dtype and out.stride() == q.stride() and lse.dtype == torch.float32


def test_wrong_arguments_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="make it for these lengths"):
        block_sparse_attention(q, k, v, random_mask(37, 70, 8, 12))
    with pytest.raises(ValueError, match="serves one batch entry and head or each"):
        block_sparse_attention(q, k, v, random_mask(37, 50, 8, 12, (1, 2)))
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        block_sparse_attention(q, k, v, random_mask(37, 50, 8, 12), scale=-1.0)
    with pytest.raises(ValueError, match="need one type"):
        block_sparse_attention(q, k.float(), v, random_mask(37, 50, 8, 12))


def packed(tiles: TokenTiles, number: int) -> list[Tensor]:
    tokens = len(tiles.slot_of_token)
    return [tiles.pack(torch.randn(1, 2, tokens, 4, dtype=torch.float64)).requires_grad_() for _ in range(number)]


def test_coarse_to_fine_without_gate_is_sparse_attention_to_the_best_tiles():
    tiles = token_tiles((1, 6, 9), (1, 3, 4))
    q, k, v, gate = packed(tiles, 4)
    dense_out = dense.attention(q, k, v, torch.arange(tiles.block).lt(tiles.lengths[:, None]).flatten())[0]
    everything = coarse_to_fine_attention(q, k, v, torch.zeros_like(gate), tiles, keep=1.0)
    torch.testing.assert_close(tiles.unpack(everything), tiles.unpack(dense_out))
    errors = []
    for keep in (0.2, 0.5, 0.9):
        sparse = coarse_to_fine_attention(q, k, v, torch.zeros_like(gate), tiles, keep)
        errors.append((tiles.unpack(sparse) - tiles.unpack(dense_out)).abs().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_the_coarse_part_is_attention_between_the_means_of_real_tokens():
    tiles = token_tiles((1, 4, 7), (1, 4, 4))  # 16 tokens, and 12 at the border
    q, k, v, gate = packed(tiles, 4)
    without = coarse_to_fine_attention(q, k, v, torch.zeros_like(gate), tiles, keep=0.5)
    difference = coarse_to_fine_attention(q, k, v, gate, tiles, keep=0.5) - without
    means = [torch.stack([x[:, :, :16].mean(2), x[:, :, 16:28].mean(2)], 2) for x in (q, k, v)]
    coarse = torch.nn.functional.scaled_dot_product_attention(*means).repeat_interleave(16, 2)
    torch.testing.assert_close(difference, gate * coarse)


def test_coarse_to_fine_in_a_short_type():
    """Tiles of 300 tokens, a number bfloat16 does not have, so that means must be taken in float32."""
    tiles = token_tiles((3, 10, 20), (3, 10, 10))
    inputs = [tiles.pack(torch.randn(1, 1, 600, 4) + 1) for _ in range(4)]
    exact = coarse_to_fine_attention(*inputs, tiles, keep=1.0)
    short = coarse_to_fine_attention(*(x.bfloat16() for x in inputs), tiles, keep=1.0)
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(tiles.unpack(short).float(), tiles.unpack(exact), rtol=0.02, atol=0.02)


def test_coarse_to_fine_has_gradients():
    tiles = token_tiles((1, 4, 5), (1, 4, 3))
    inputs = packed(tiles, 4)
    assert torch.autograd.gradcheck(lambda *x: coarse_to_fine_attention(*x, tiles, keep=0.5), inputs, fast_mode=True)
    with pytest.raises(ValueError, match="pack q, k, v and gate first"):
        coarse_to_fine_attention(*(x[:, :, :-1] for x in inputs), tiles, keep=0.5)
