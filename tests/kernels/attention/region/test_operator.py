"""Region attention by its reference: the rows of attention over everything, with the caches updated in place."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.dense import oracle as dense
from diffusion_opt.kernels.attention.region.operator import Region, attention_op, write_rows_op
from diffusion_opt.kernels.attention.sparse.masks import BlockMask

B, H, LENGTH, D = 2, 3, 41, 5


def full_sequence(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v of all tokens, as one full forward pass would have them."""
    return [torch.randn(B, H, LENGTH, D, dtype=dtype) for _ in range(3)]


def some_active(first: int = 9, second: int = 4) -> Tensor:
    """Active tokens (b, l), a different number in each batch entry."""
    active = torch.zeros(B, LENGTH, dtype=torch.bool)
    for row, number in enumerate((first, second)):
        active[row, torch.randperm(LENGTH)[:number]] = True
    return active


def rows_of(region: Region, x: Tensor) -> Tensor:
    """The active rows (b, h, n, d) of a full tensor, 0 where a list has none."""
    return torch.stack([region.gather(head) for head in x.unbind(1)], 1)


def stale(x: Tensor, active: Tensor) -> Tensor:
    """A cache whose active rows are of an earlier step."""
    return torch.where(active[:, None, :, None], torch.randn_like(x), x)


def test_lists_hold_the_active_tokens_in_order():
    active = some_active()
    region = Region.from_mask(active)
    assert region.index.shape == (2, 9) and region.index.dtype == torch.int32
    for row in range(B):
        listed = [token for token in region.index[row].tolist() if token >= 0]
        assert listed == active[row].nonzero().flatten().tolist()
    assert region.index[1, 4:].eq(-1).all()
    hidden = torch.randn(B, LENGTH, 7)
    gathered = region.gather(hidden)
    assert torch.equal(gathered[0], hidden[0, active[0]])
    assert torch.equal(gathered[1, :4], hidden[1, active[1]]) and not gathered[1, 4:].any()


def test_region_equals_full_attention_on_the_changed_rows():
    (q, k, v), active = full_sequence(), some_active()
    region = Region.from_mask(active)
    k_cache, v_cache = stale(k, active), stale(v, active)
    out, lse = region.attention(rows_of(region, q), rows_of(region, k), rows_of(region, v), k_cache, v_cache)
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)  # in place, and nothing else was touched
    everything, everything_lse = dense.attention(q, k, v)
    torch.testing.assert_close(out, rows_of(region, everything))
    for row, number in ((0, 9), (1, 4)):
        torch.testing.assert_close(lse[row, :, :number], everything_lse[row][:, active[row]])
    assert bool((lse[1, :, 4:] == -torch.inf).all()) and not out[1, :, 4:].any()


def test_all_tokens_active_is_full_attention():
    q, k, v = full_sequence(torch.float32)
    region = Region.from_mask(torch.ones(B, LENGTH, dtype=torch.bool))
    out, _ = region.attention(q, k, v, torch.zeros_like(k), torch.zeros_like(v))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_the_order_of_the_list_does_not_matter():
    (q, k, v), active = full_sequence(), some_active(6, 6)
    region = Region.from_mask(active)
    order = torch.randperm(6)
    other = Region.from_index(region.index[:, order], LENGTH)
    rows = [rows_of(region, x) for x in (q, k, v)]
    caches = [stale(k, active), stale(v, active)]
    out, _ = region.attention(*rows, *(x.clone() for x in caches))
    again, _ = other.attention(*(x[:, :, order] for x in rows), *caches)
    torch.testing.assert_close(again, out[:, :, order])


@pytest.mark.parametrize("block_m", [3, 4])
def test_a_packed_mask_takes_what_any_of_its_tokens_wanted(block_m):
    active = some_active()
    region = Region.from_mask(active)
    mask = BlockMask.from_dense(torch.rand(1, H, 6, 6) > 0.6, 8, 7)
    packed = region.packed_mask(mask, block_m)
    wanted = mask.dense().expand(B, -1, -1, -1)
    for b, row in torch.cartesian_prod(torch.arange(B), torch.arange(packed.num_rows)).tolist():
        tokens = [token for token in region.index[b, row * block_m : (row + 1) * block_m].tolist() if token >= 0]
        expected = torch.zeros(H, 6, dtype=torch.bool)
        for token in tokens:
            expected |= wanted[b, :, token // 8]
        assert torch.equal(packed.dense()[b, :, row], expected)


def test_region_with_a_mask_equals_sparse_attention_where_whole_blocks_are_active():
    q, k, v = full_sequence()
    active = torch.zeros(B, LENGTH, dtype=torch.bool)
    active[:, 8:24] = True
    mask = BlockMask.from_dense(torch.rand(B, H, 6, 6) > 0.5, 8, 7)
    region = Region.from_mask(active)
    rows = [rows_of(region, x) for x in (q, k, v)]
    out, lse = region.attention(*rows, stale(k, active), stale(v, active), mask=region.packed_mask(mask, 8))
    expected, expected_lse = dense.attention(q, k, v, mask.elements(LENGTH, LENGTH))
    torch.testing.assert_close(out, expected[:, :, 8:24])
    torch.testing.assert_close(lse, expected_lse[:, :, 8:24])


def test_registration():
    (q, k, v), active = full_sequence(torch.float32), some_active()
    region = Region.from_mask(active)
    rows = [rows_of(region, x) for x in (q, k, v)]
    no_mask = (None, None, None, 1, 1, 1)
    torch.library.opcheck(attention_op, (rows[0], k, v, region.index, *no_mask, 0.5))
    torch.library.opcheck(write_rows_op, (k, v, rows[1], rows[2], region.index))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no token is active"):
        Region.from_mask(torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"tokens are 0 to 4, or -1 for none, got \[1, 5\]"):
        Region.from_index(torch.tensor([[1, 5]]), 5)
    with pytest.raises(ValueError, match="listed twice"):
        Region.from_index(torch.tensor([[3, -1, -1], [2, 4, 2]]), 5)
    (q, k, v), region = full_sequence(), Region.from_mask(some_active())
    rows = [rows_of(region, x) for x in (q, k, v)]
    with pytest.raises(ValueError, match="scale must be positive"):
        region.attention(*rows, k, v, scale=0.0)
    with pytest.raises(ValueError, match="a cache has 41 tokens"):
        region.update_(k[:, :, :-1], v[:, :, :-1], *rows[1:])
    with pytest.raises(ValueError, match="rows of its type"):
        region.update_(k.float(), v.float(), *rows[1:])
    with pytest.raises(ValueError, match="mask must be one of the whole sequence"):
        region.packed_mask(BlockMask.from_dense(torch.ones(1, 1, 4, 4).bool(), 8, 8), 4)
    with pytest.raises(ValueError, match="make it for these lengths"):
        region.attention(*rows, k, v, mask=BlockMask.from_dense(torch.ones(1, 1, 4, 4).bool(), 8, 8))
