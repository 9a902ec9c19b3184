"""Masks that try a sparse kernel: ragged ends, rows without a tile, columns that nobody wants, blocks with gaps."""

import torch

from diffusion_opt.kernels.attention.sparse.masks import BlockMask, sliding_tile
from diffusion_opt.kernels.attention.sparse.packing import token_tiles


def random_mask(
    lq: int, lk: int, block_m: int, block_n: int, shape: tuple[int, int] = (1, 1), share: float = 0.5
) -> BlockMask:
    """Random tiles; the second row of tiles has none, and nobody attends to the first column."""
    table = torch.rand(*shape, -(-lq // block_m), -(-lk // block_n)) < share
    table[:, :, -1, -1] = True  # the ragged corner is there
    table[:, :, 1] = False
    table[:, :, :, 0] = False
    return BlockMask.from_dense(table, block_m, block_n)


def window_mask() -> BlockMask:
    """A sliding window over a grid whose tiles at the border have fewer tokens; 6 blocks of 16, with text."""
    return sliding_tile(token_tiles((1, 5, 7), (1, 3, 4), num_text=20), (1, 1, 2))


def to(mask: BlockMask, device: torch.device) -> BlockMask:
    """The mask on a device."""
    lengths = None if mask.lengths is None else mask.lengths.to(device)
    numbers = (mask.num_columns, mask.block_m, mask.block_n)
    return BlockMask(mask.indices.to(device), mask.counts.to(device), *numbers, lengths)
