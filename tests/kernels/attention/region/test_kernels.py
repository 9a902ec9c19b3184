"""The region kernels against float64: queries of a list, caches written in place, whole or by a mask."""

import pytest
import torch
from kernels.accuracy import assert_at_most_twice_the_error_of_torch
from kernels.attention.sparse.sparse_masks import random_mask, to
from torch import Tensor

from diffusion_opt.kernels.attention.region import oracle as reference
from diffusion_opt.kernels.attention.region.operator import Region, attention_op
from diffusion_opt.kernels.attention.sparse.masks import BlockMask

pytestmark = pytest.mark.interpreted

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def ragged_region(length: int, numbers: tuple[int, ...], device: torch.device) -> Region:
    active = torch.zeros(len(numbers), length, dtype=torch.bool)
    for row, number in enumerate(numbers):
        active[row, torch.randperm(length)[:number]] = True
    return Region.from_mask(active.to(device))


def tensors(region: Region, h: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh rows of q, k, v and stale caches of k, v."""
    b, n = region.index.shape
    device = region.index.device
    rows = [torch.randn(b, h, n, d).to(device, dtype) for _ in range(3)]
    return rows, [torch.randn(b, h, region.num_tokens, d).to(device, dtype) for _ in range(2)]


def check(region: Region, h: int, d: int, dtype: torch.dtype, mask: BlockMask | None = None) -> None:
    (q, k, v), caches = tensors(region, h, d, dtype)
    expected = [reference.with_rows(cache, x, region.index) for cache, x in zip(caches, (k, v), strict=True)]
    out, lse = region.attention(q, k, v, *caches, mask=mask)
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])
    scale = d**-0.5
    exact, exact_lse = reference.region_attention(
        q.double(), *(x.double() for x in expected), region.index, mask, scale
    )
    by_torch, _ = reference.region_attention(q, *expected, region.index, mask, scale)
    assert_at_most_twice_the_error_of_torch(out, by_torch, exact)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5)
    absent = (region.index < 0)[:, None].expand_as(lse)
    assert not out[absent].any() and bool((lse[absent] == -torch.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_cache(dtype, device):
    check(ragged_region(150, (40, 17), device), 2, 24, DTYPES[dtype])


@pytest.mark.parametrize("numbers", [(1, 1), (130, 3), (64, 64)])
def test_regions_of_all_sizes(numbers, device):
    """One token; a region with tiles that hold no query in one batch entry; whole tiles."""
    check(ragged_region(192, numbers, device), 1, 16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_a_mask(dtype, device):
    region = ragged_region(160, (40, 70), device)
    mask = to(random_mask(160, 160, 32, 32, (1, 2)), device)
    check(region, 2, 16, DTYPES[dtype], region.packed_mask(mask, 16))


def test_strided_caches_are_written_in_place(device):
    """Caches laid out (b, l, h, d), cut out of one tensor with something else beside them."""
    region = ragged_region(50, (20, 7), device)
    (q, k, v), _ = tensors(region, 2, 16, torch.float32)
    memory = torch.randn(2, 50, 3, 2, 16, device=device)
    before = memory.clone()
    k_cache, v_cache, other = (x.transpose(1, 2) for x in memory.unbind(2))
    expected = [reference.with_rows(before[:, :, i].transpose(1, 2), x, region.index) for i, x in ((0, k), (1, v))]
    out, _ = region.attention(q, k, v, k_cache, v_cache)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
    assert torch.equal(other, before[:, :, 2].transpose(1, 2))
    torch.testing.assert_close(out, reference.region_attention(q, *expected, region.index, None, 0.25)[0])


def test_shapes_and_strides_are_foretold(device):
    region = ragged_region(40, (20, 7), device)
    (q, _, _), (k_cache, v_cache) = tensors(region, 1, 16, torch.float32)
    arguments = (q, k_cache, v_cache, region.index, None, None, None, 1, 1, 1, 0.5)
    torch.library.opcheck(attention_op, arguments, test_utils=("test_schema", "test_faketensor"))
