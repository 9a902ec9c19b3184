"""Which tokens count as changed, how the set grows, and how it is rounded."""

import hypothesis.strategies as st
import pytest
import torch
from caching.region.models import noise
from hypothesis import given, settings
from torch.nn import functional as F

from diffusion_opt.caching.region.detect import BUCKETS, bucket_size, change_scores, dilate, fill_bucket, nearness
from diffusion_opt.caching.region.families import grid_positions

CPU = torch.device("cpu")


def test_scores_are_relative_to_the_mean_size_and_the_largest_of_the_batch():
    before = torch.tensor([[[3.0, 4.0], [0.0, 15.0]], [[6.0, 8.0], [0.0, 10.0]]])  # mean sizes 10 and 10
    moved = before.clone()
    moved[0, 0, 0] += 1
    moved[1, 0, 1] -= 2
    torch.testing.assert_close(change_scores(moved, before), torch.tensor([0.2, 0.0]))
    assert not change_scores(before, before).any()


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 7)),
    ring=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_dilation_equals_max_pooling_on_a_full_grid(size, ring, seed):
    frames, rows, columns = size
    active = torch.rand(frames, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.15
    pooled = F.max_pool2d(active[:, None].float(), 2 * ring + 1, stride=1, padding=ring).bool()
    grown = dilate(active.flatten(), grid_positions(*size, CPU), ring)
    assert torch.equal(grown, pooled.flatten())


def test_dilation_needs_no_grid_and_stays_in_its_frame():
    positions = torch.tensor([[0, 0, 0], [0, 0, 1], [10, 0, 0], [0, 5, 5]])
    grown = dilate(torch.tensor([True, False, False, False]), positions, 1)
    assert grown.tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="got -1"):
        dilate(grown, positions, -1)


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(1, 300), share=st.floats(0, 1))
def test_buckets_hold_the_active_tokens_and_are_few(num_tokens, share):
    num_active = round(share * num_tokens)
    size = bucket_size(num_active, num_tokens)
    assert num_active <= size <= num_tokens
    assert (size == 0) == (num_active == 0)
    allowed = {0, num_tokens} | {-int(-bucket * num_tokens // 1) for bucket in BUCKETS}
    assert size in allowed
    if num_active > 0.7 * num_tokens:
        assert size == num_tokens


def test_a_bucket_is_filled_with_the_highest_scores_in_order():
    active = torch.tensor([False, True, False, False, True, False])
    scores = torch.tensor([0.3, 0.0, 0.1, 0.9, 0.0, 0.3])
    assert fill_bucket(active, scores, 4).tolist() == [0, 1, 3, 4]
    assert fill_bucket(active, noise(6), 6).tolist() == list(range(6))
    with pytest.raises(ValueError, match="a bucket of 1 cannot hold 2"):
        fill_bucket(active, scores, 1)


def test_nearness_falls_with_the_distance():
    positions = grid_positions(1, 1, 8, CPU)
    active = torch.zeros(8, dtype=torch.bool)
    active[2] = True
    assert nearness(active, positions).tolist() == [2, 3, 4, 3, 2, 1, 0, 0]
