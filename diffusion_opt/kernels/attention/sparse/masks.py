"""Which blocks of keys each block of queries attends to: lists of indices, and the static patterns that fill them.

Sparse attention saves time only if whole tiles are skipped, so a mask is a table of tiles. The kernel never sees zeros
and ones; it walks a list (`BlockMask.indices`, of `counts` entries) for each row of tiles, and its work is the number
of entries: at a density of 0.2 a fifth of that of dense attention, at the cost of the indirection. Blocks of 64 or 128
tokens suit the kernels; others are cut into tiles that divide them.

Two makers need no data, only where tokens lie. Attention of trained video models falls off with distance:

    sliding_tile   tile attends to a window of tiles around it, in frames, rows and columns (STA, Zhang et al. 2025,
                   arXiv 2502.04507). Windows at the border are moved inside, so all rows have the same work.
    radial         a band around the same place in every frame, half as wide for each doubling of the distance in frames
                   (Li et al. 2025, arXiv 2506.19852): O(n log n) tiles instead of O(n^2)

`predicted_masks.py` makes masks from q and k, `coarse_to_fine.py` learns them. attention-gym and flex_attention write
masks as predicates of single positions and find out by evaluating them which tiles are empty; here the pattern is made
of tiles from the start, exact for tokens packed into tiles (`packing.py`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusion_opt.kernels.attention.sparse.packing import TokenTiles


@dataclass(frozen=True, slots=True)
class BlockMask:
    """Lists of key blocks, one for each block of queries; batch and heads of size 1 are shared by all.

    Raises ValueError if shapes, types or sizes do not fit together. That indices are in range and appear once in a list
    is the maker's duty: looking would make a GPU wait.
    """

    indices: Int[Tensor, "b h rows most"]  # int32; entries from `counts` on are never read
    counts: Int[Tensor, "b h rows"]  # int32: entries of each list
    num_columns: int  # blocks of keys there are
    block_m: int  # queries of a block
    block_n: int  # keys of a block
    lengths: Int[Tensor, " columns"] | None = None  # int32: real keys at the head of each block; None: all of them

    def __post_init__(self) -> None:
        if self.indices.dtype is not torch.int32 or self.counts.dtype is not torch.int32:
            raise ValueError(f"indices and counts are int32, got {self.indices.dtype} and {self.counts.dtype}")
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(f"one count a list: {tuple(self.indices.shape)} lists, {tuple(self.counts.shape)} counts")
        if self.lengths is not None and (self.lengths.dtype, len(self.lengths)) != (torch.int32, self.num_columns):
            raise ValueError(f"lengths are {self.num_columns} int32, got {len(self.lengths)} {self.lengths.dtype}")
        if min(self.block_m, self.block_n, self.num_columns) < 1:
            raise ValueError(f"blocks have 1 token or more, got {self.num_columns} of {self.block_m} x {self.block_n}")

    @classmethod
    def from_dense(
        cls, dense: Bool[Tensor, "b h rows columns"], block_m: int, block_n: int, lengths: Tensor | None = None
    ) -> "BlockMask":
        """The lists of a table of tiles. Waits for the device once, to learn the longest list.

        Raises ValueError for a table that is not bool: numbers would be counted, not listed.
        """
        if dense.dtype is not torch.bool:
            raise ValueError(f"a table of tiles is bool, True for what is computed, got {dense.dtype}")
        counts = dense.sum(-1, dtype=torch.int32)
        most = max(1, int(counts.max()))
        order = dense.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        listed = torch.arange(most, device=dense.device) < counts[..., None]
        indices = torch.where(listed, order, -1).to(torch.int32)
        return cls(indices, counts, dense.shape[-1], block_m, block_n, lengths)

    def dense(self) -> Bool[Tensor, "b h rows columns"]:
        """The table of tiles: which are computed."""
        listed = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        beyond = torch.where(
            listed, self.indices, self.num_columns
        ).long()  # what is not listed goes to an extra column
        table = torch.zeros(*self.counts.shape, self.num_columns + 1, dtype=torch.bool, device=self.indices.device)
        return table.scatter(-1, beyond, True)[..., : self.num_columns]

    def elements(self, lq: int, lk: int) -> Bool[Tensor, "b h lq lk"]:
        """The mask of single tokens that the tiles stand for. Raises ValueError if the lengths are not the mask's."""
        self.check(lq, lk)
        tokens = self.dense().repeat_interleave(self.block_m, 2)[:, :, :lq]
        tokens = tokens.repeat_interleave(self.block_n, 3)[..., :lk]
        if self.lengths is None:
            return tokens
        real = torch.arange(self.block_n, device=tokens.device) < self.lengths[:, None]
        return tokens & real.flatten()[:lk]

    def check(self, lq: int, lk: int) -> None:
        """Raise ValueError unless the mask has as many blocks as sequences of these lengths."""
        rows, columns = -(-lq // self.block_m), -(-lk // self.block_n)
        if (rows, columns) != (self.counts.shape[2], self.num_columns):
            raise ValueError(
                f"{lq} queries and {lk} keys are {rows} x {columns} blocks of {self.block_m} x {self.block_n}, this "
                f"mask has {self.counts.shape[2]} x {self.num_columns}: make it for these lengths"
            )

    def check_heads(self, b: int, h: int) -> None:
        """Raise ValueError unless the lists serve one batch entry and head or each: a kernel would read past them."""
        if any(own not in (1, whole) for own, whole in zip(self.counts.shape[:2], (b, h), strict=True)):
            raise ValueError(
                f"a mask serves one batch entry and head or each: there are {(b, h)}, the mask has "
                f"{tuple(self.counts.shape[:2])}"
            )

    @property
    def num_rows(self) -> int:
        """Blocks of queries."""
        return self.counts.shape[2]

    def has_gaps(self, lk: int) -> bool:
        """Whether a listed block of keys may have places without a key."""
        return self.lengths is not None or lk != self.num_columns * self.block_n

    @property
    def density(self) -> float:
        """Share of all tiles that is computed: the time of an ideal sparse kernel, relative to dense attention."""
        return float(self.counts.sum()) / (self.counts.numel() * self.num_columns)

    def transposed(self) -> "BlockMask":
        """For each block of keys, the blocks of queries that attend to it: what the gradient of k and v needs."""
        return BlockMask.from_dense(self.dense().mT, self.block_n, self.block_m)

    def refined(self, block_m: int, block_n: int) -> "BlockMask":
        """The same mask in smaller blocks. Raises ValueError unless they divide the mask's own."""
        if (block_m, block_n) == (self.block_m, self.block_n):
            return self
        if self.block_m % block_m or self.block_n % block_n:
            raise ValueError(f"{block_m} x {block_n} must divide the blocks of {self.block_m} x {self.block_n}")
        parts = self.block_n // block_n
        pieces = torch.arange(parts, dtype=torch.int32, device=self.indices.device)
        indices = (self.indices[..., None] * parts + pieces).flatten(-2).repeat_interleave(self.block_m // block_m, 2)
        counts = (self.counts * parts).repeat_interleave(self.block_m // block_m, 2)
        lengths = self.lengths
        if lengths is not None:
            lengths = (lengths[:, None] - pieces * block_n).clamp(0, block_n).flatten()
        return BlockMask(indices, counts, self.num_columns * parts, block_m, block_n, lengths)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
        """The mask as arguments of a torch operator, which takes tensors and numbers only."""
        return self.indices, self.counts, self.lengths, self.num_columns, self.block_m, self.block_n

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        """What a kernel takes: indices, counts, lengths, then lists to the next batch and head, and room of a list.

        Without lengths another tensor stands in for them, which the kernel does not read.
        """
        b, h, rows, most = self.indices.shape
        counts = self.counts.contiguous()
        lengths = counts if self.lengths is None else self.lengths
        return self.indices.contiguous(), counts, lengths, h * rows * (b > 1), rows * (h > 1), most


def sliding_tile(tiles: TokenTiles, window: tuple[int, int, int]) -> BlockMask:
    """Each tile attends to the `window` (frames, rows, columns, in tiles) around it; text to all, and all to text.

    For q, k, v packed by `tiles`. The window is moved inside the grid at its borders, and is the whole axis where it is
    larger. Raises ValueError for a window below 1.
    """
    if min(window) < 1:
        raise ValueError(f"a window has 1 tile or more along each axis, got {window}")
    device = tiles.lengths.device
    table = torch.ones(1, 1, dtype=torch.bool, device=device)
    for count, width in zip(tiles.counts, window, strict=True):
        place = torch.arange(count, device=device)
        first = (place - width // 2).clamp(0, max(0, count - width))[:, None]
        near = (place >= first) & (place < first + width)
        table = (table[:, None, :, None] & near[None, :, None, :]).reshape(len(table) * count, -1)
    text = tiles.num_text_blocks
    table = torch.nn.functional.pad(table, (0, text, 0, text), value=True)
    return BlockMask.from_dense(table[None, None], tiles.block, tiles.block, tiles.lengths)


def radial(num_frames: int, frame_tokens: int, block: int, decay: float = 1.0) -> BlockMask:
    """Bands around the same place in each frame, narrower with distance; every token sees its own and the first frame.

    At d frames of distance a token at place a sees places within `decay * frame_tokens / 2^floor(log2 d)`. Where that
    is less than a block, frames are skipped instead, every ceil(block / width)-th remains, and one block is the band. A
    tile is computed if any of its tokens is wanted. For tokens in the model's own order, frame after frame, in tiles of
    `block` x `block`. Raises ValueError for sizes that are not positive.
    """
    if min(num_frames, frame_tokens, block) < 1 or decay <= 0:
        raise ValueError(
            f"sizes are positive, got {num_frames} frames of {frame_tokens} tokens, block {block}, decay {decay}"
        )
    num_blocks = -(-num_frames * frame_tokens // block)
    token = torch.arange(num_frames * frame_tokens)[:, None]
    frame = torch.arange(num_frames)
    distance = (token // frame_tokens - frame).abs()
    width = decay * frame_tokens / 2.0 ** distance.clamp(min=1).log2().floor()
    every = (block / width).ceil().long().clamp(min=1)
    width = torch.where((frame == 0) | (distance == 0), frame_tokens, width.clamp(min=block).long())
    place = token % frame_tokens
    first = frame * frame_tokens + (place - width).clamp(min=0)
    last = frame * frame_tokens + (place + width).clamp(max=frame_tokens - 1)
    wanted = (distance % every == 0) | (frame == 0)
    edges = torch.zeros(num_blocks, num_blocks + 1, dtype=torch.int32)  # +1 where a run of tiles begins, -1 behind it
    row = (token // block).expand_as(wanted)[wanted]
    one = torch.ones_like(row, dtype=torch.int32)
    edges.index_put_((row, first[wanted] // block), one, accumulate=True)
    edges.index_put_((row, last[wanted] // block + 1), -one, accumulate=True)
    table = edges.cumsum(1)[:, :num_blocks] > 0
    return BlockMask.from_dense(table[None, None], block, block)
