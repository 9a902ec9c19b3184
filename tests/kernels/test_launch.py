"""The launch table: every row is a launch, what spills is absent and says so, and float32 and masks find their rows."""

import pytest
import torch

from diffusion_opt.kernels.attention.door import BACKWARD, LOW_PRECISION
from diffusion_opt.kernels.launch import (
    ARCHITECTURES,
    HEAD_DIMS,
    LAUNCH,
    chosen,
    heads,
    launch,
    padded_head_dim,
    row_of,
)
from diffusion_opt.kernels.quantizers.oracle import EIGHT_BIT_KEYS


def test_every_choice_is_a_tile_of_matrix_units():
    for name, by_arch in LAUNCH.items():
        assert set(by_arch) <= set(ARCHITECTURES), name
        for by_dim in by_arch.values():
            assert set(by_dim) <= set(HEAD_DIMS), name
            for choice in by_dim.values():
                sides = choice.block_m, choice.block_n
                assert all(16 <= side <= 128 and side & (side - 1) == 0 for side in sides), (name, choice)
                assert choice.num_warps in (4, 8) and 1 <= choice.num_stages <= 4, (name, choice)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_16_bits_have_a_row_for_every_head_in_both_directions(arch):
    for forward, backward in BACKWARD.items():
        for kernel in (forward, *backward):
            for masked in (False, True):
                assert set(LAUNCH[row_of(kernel, torch.bfloat16, masked)][arch]) == set(HEAD_DIMS)


def test_the_front_knows_rows_of_the_table_only():
    assert {row for row, _ in LOW_PRECISION.values()} | set(BACKWARD) | set().union(*BACKWARD.values()) <= set(LAUNCH)


@pytest.mark.parametrize(
    ("kernel", "dtype", "masked", "row"),
    [
        ("dense_keys", torch.bfloat16, False, "dense_keys"),
        ("dense_keys", torch.bfloat16, True, "dense_keys_masked"),
        ("dense_keys", torch.float32, True, "dense_keys_fp32"),
        ("int8_scores_fp16_values", torch.float32, False, "int8_scores_fp16_values"),  # codes: no float32 inside
        ("int8_scores_fp16_values", torch.float32, True, "int8_scores_fp16_values_masked"),
        ("region", torch.float16, True, "region"),
    ],
)
def test_float32_and_masks_have_rows_of_their_own_where_they_need_them(kernel, dtype, masked, row):
    assert row_of(kernel, dtype, masked) == row


def test_what_is_absent_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="no kernel named 'dense'"):
        launch("dense", 90, 64)
    with pytest.raises(ValueError, match="no launch choice for sm_80; it runs on sm_89"):
        launch("fp8_scores_fp8_values", 80, 64)
    with pytest.raises(ValueError, match="'dense_forward_fp32' on sm_90 has no choice for heads of 256 numbers"):
        launch("dense_forward_fp32", 90, 200)
    assert 80 not in chosen("fp8_scores_fp8_values", 64)
    assert not chosen("dense_forward_fp32", 200)


def test_head_dimensions_are_padded_to_powers_of_two():
    assert [padded_head_dim(d) for d in (1, 16, 17, 72, 128, 129, 256)] == [16, 16, 32, 128, 128, 256, 256]
    small, large = launch("dense_forward", 90, 64), launch("dense_forward", 90, 128)
    assert heads(small, large) == {16: small, 32: small, 64: small, 128: large}


def test_the_tile_of_the_8_bit_oracle_is_that_of_sm_90_without_a_mask():
    for kernel in ("int8_scores_fp16_values", "int8_scores_fp8_values", "fp8_scores_fp8_values"):
        for arch, by_dim in LAUNCH[kernel].items():
            assert by_dim[128].block_n == EIGHT_BIT_KEYS if arch == 90 else by_dim[128].block_n <= 64
        assert all(choice.block_n <= 64 for by_dim in LAUNCH[f"{kernel}_masked"].values() for choice in by_dim.values())
