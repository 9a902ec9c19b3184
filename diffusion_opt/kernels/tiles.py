"""What every kernel of this room begins and ends with: which tile of which head it owns, and rows in and out.

A launch has one dimension of programs. They are numbered tile by tile within a head, and head by head within the batch,
so neighbors work on the same keys and find them in the cache:

    program = (b num_heads + h) num_tiles + tile

Tensors are (b, h, l, d) with any strides, and come as a pointer and a tuple of four steps. `head_of` moves the pointer
to a head with 64-bit arithmetic, because a batch of videos has more than 2^31 numbers; inside a head 32 bits suffice
for the rows of a tile. A step that is 1, or a multiple of 16, is known to the compiler: Triton looks into tuples too.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def program_of_head(num_rows, num_heads, BLOCK: tl.constexpr):
    """Tile of this program; its head among all heads of the batch; the batch entry and the head of that entry."""
    num_tiles = tl.cdiv(num_rows, BLOCK)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    return tl.program_id(0) % num_tiles, head, head // num_heads, head % num_heads


@triton.jit
def head_of(X, strides, b, h):
    """Where a head begins."""
    return X + b * strides[0] + h * strides[1]


@triton.jit
def load_rows(base, start, rows, dims, strides, end, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr):
    """Rows start + rows of a head as a tile (rows, dims); zeros where the tile reaches past `end` or the head."""
    address = base + tl.cast(start, tl.int64) * strides[2] + rows[:, None] * strides[2] + dims[None, :] * strides[3]
    inside = (start + rows < end)[:, None]
    if HEAD_DIM == dims.shape[0]:
        tile = tl.load(address, mask=inside, other=0.0) if TAIL else tl.load(address)
    elif TAIL:
        tile = tl.load(address, mask=inside & (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(address, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, start, rows, dims, strides, end, tile, HEAD_DIM: tl.constexpr):
    """Write a tile to rows start + rows of a head, where they exist, in the type of its memory."""
    address = base + tl.cast(start, tl.int64) * strides[2] + rows[:, None] * strides[2] + dims[None, :] * strides[3]
    tl.store(address, tile.to(base.dtype.element_ty), mask=(start + rows < end)[:, None] & (dims < HEAD_DIM)[None, :])


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply: float32 as three products of TF32, which keeps float32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
