"""Put the tokens of a video or an image into tiles, so that neighbors in space and time share a block of keys.

A transformer flattens its token grid (frames, rows, columns) row by row: 64 consecutive tokens are one long row, and a
sparse attention that works on blocks of 64 can only keep or drop such rows. In the order of tiles the same 64 tokens
are a cube of 4 x 4 x 4, whose tokens want the same neighbors: what sliding tile attention (Zhang et al. 2025, arXiv
2502.04507) and video sparse attention (Zhang et al. 2025, arXiv 2505.13389) build on. Attention itself does not care
about order, so packing q, k and v and unpacking the output changes nothing but which blocks exist.

    packed[slot_of_token[i]] = token i            tile 0 | tile 1 | … | text blocks, each of `block` slots

Where a grid is no multiple of the tile (Wan at 480p has 21 x 30 x 52 tokens), tiles at the border hold fewer tokens.
These come first in their block, the slots after them are zero, and `lengths` says how many are real, so no key that
does not exist is attended to. Prompt tokens of joint attention (FLUX.2, HunyuanVideo) get blocks of their own at the
end.
"""

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

LANES = 16  # matrix units take tiles whose sides are multiples of this, so blocks are


@dataclass(frozen=True, slots=True)
class TokenTiles:
    """An order of tokens by tiles. Made by `token_tiles`."""

    counts: tuple[int, int, int]  # tiles along frames, rows, columns
    block: int  # slots of a tile, a multiple of 16
    slot_of_token: Int[Tensor, " tokens"]  # int64: where each token goes
    lengths: Int[Tensor, " blocks"]  # int32: real tokens at the head of each block, the tiles' first, then the text's

    @property
    def num_text_blocks(self) -> int:
        return len(self.lengths) - prod(self.counts)

    @property
    def num_slots(self) -> int:
        """Length of a packed sequence, padding included."""
        return len(self.lengths) * self.block

    def pack(self, x: Float[Tensor, "*b tokens c"]) -> Float[Tensor, "*b slots c"]:
        """Tokens in the order of tiles; slots without a token are 0."""
        if x.shape[-2] != len(self.slot_of_token):
            raise ValueError(f"these tiles are made for {len(self.slot_of_token)} tokens, got {x.shape[-2]}")
        packed = x.new_zeros(*x.shape[:-2], self.num_slots, x.shape[-1])
        return packed.index_copy(-2, self.slot_of_token, x)

    def unpack(self, packed: Float[Tensor, "*b slots c"]) -> Float[Tensor, "*b tokens c"]:
        """Undo `pack`."""
        if packed.shape[-2] != self.num_slots:
            raise ValueError(f"these tiles have {self.num_slots} slots, got {packed.shape[-2]}")
        return packed.index_select(-2, self.slot_of_token)


def token_tiles(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    num_text: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> TokenTiles:
    """The order by tiles of a grid of tokens (frames, rows, columns), flattened row by row; images have one frame.

    `tile` counts tokens the same way. `num_text` prompt tokens stand behind the grid's in the model's sequence, or
    before them (`text_first`, as in FLUX.2).
    Raises ValueError for sizes below 1 or a tile larger than the grid.
    """
    if min(*grid, *tile) < 1 or num_text < 0 or any(side > whole for side, whole in zip(tile, grid, strict=True)):
        raise ValueError(
            f"a tile has 1 token or more and at most the grid's along each axis, and num_text is 0 or more: "
            f"got tile {tile}, grid {grid}, num_text {num_text}"
        )
    block = -(-prod(tile) // LANES) * LANES
    counts = tuple(-(-whole // side) for whole, side in zip(grid, tile, strict=True))
    axes = [torch.arange(whole, device=device) // side for whole, side in zip(grid, tile, strict=True)]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    in_tile = ((t * counts[1] + h) * counts[2] + w).flatten()
    in_text = prod(counts) + torch.arange(num_text, device=device) // block
    block_of_token = torch.cat([in_text, in_tile] if text_first else [in_tile, in_text])
    lengths = torch.bincount(block_of_token, minlength=prod(counts))
    order = torch.argsort(block_of_token, stable=True)
    first = (lengths.cumsum(0) - lengths)[block_of_token[order]]
    slot_of_token = torch.empty_like(order)
    slot_of_token[order] = block_of_token[order] * block + torch.arange(len(order), device=device) - first
    return TokenTiles(counts, block, slot_of_token, lengths.to(torch.int32))
