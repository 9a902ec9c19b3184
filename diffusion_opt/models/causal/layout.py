"""Which chunk of a video sees which, in what order: full, block-causal, windowed with a sink, and teacher forcing.

A causal model makes a video chunk by chunk. Chunk k sees itself and those before it that are kept: the first `sink`
ones and the last `window - 1`,

    kept(k) = { j <= k : j < sink or j > k - window }.

A token's position in time is its chunk's place in that list and not its number, so positions never run out, and a key
that is cached before its rotation serves at all later places ("relative" positions; the sink of StreamingLLM, Xiao et
al. 2023, arXiv 2309.17453). Training lists the same places, so a window in use is the window in training; one that is
switched on later makes videos collapse.

Teacher forcing (Causal Forcing, arXiv 2602.02214) puts a clean copy of each chunk beside the noisy one, at the same
position: clean chunk i sees clean ones up to i, noisy chunk i sees clean ones before it and itself.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def kept(chunk: int, window: int | None = None, sink: int = 0) -> tuple[int, ...]:
    """Numbers of the chunks that a chunk sees, itself last. `window` counts the chunk itself; None: all before it."""
    return tuple(j for j in range(chunk + 1) if j < sink or window is None or j > chunk - window)


def check_window(window: int | None, sink: int) -> None:
    """Raises ValueError for a window without a chunk, and a negative sink."""
    if (window is not None and window < 1) or sink < 0:
        raise ValueError(f"need window >= 1 (the chunk itself counts) or None, and sink >= 0; got {window} and {sink}")


@dataclass(frozen=True)
class Layout:
    """For each row of a pass the rows that it sees, in order of their positions, and its own place among them."""

    sees: tuple[tuple[int, ...], ...]
    own: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= place < len(seen) for seen, place in zip(self.sees, self.own, strict=True)):
            raise ValueError("each row needs the list of rows that it sees and its own place in it")

    @classmethod
    def full(cls, num_chunks: int) -> "Layout":
        """All see all: the stock transformer."""
        return cls((tuple(range(num_chunks)),) * num_chunks, tuple(range(num_chunks)))

    @classmethod
    def causal(cls, num_chunks: int, window: int | None = None, sink: int = 0) -> "Layout":
        """Each chunk sees what `kept` says."""
        check_window(window, sink)
        lists = tuple(kept(k, window, sink) for k in range(num_chunks))
        return cls(lists, tuple(len(one) - 1 for one in lists))

    @classmethod
    def teacher_forcing(cls, num_chunks: int, window: int | None = None, sink: int = 0) -> "Layout":
        """Rows are the clean chunks, then the noisy ones."""
        clean = cls.causal(num_chunks, window, sink)
        noisy = tuple((*one[:-1], num_chunks + k) for k, one in enumerate(clean.sees))
        return cls(clean.sees + noisy, clean.own * 2)

    @property
    def num_rows(self) -> int:
        return len(self.sees)

    @property
    def num_places(self) -> int:
        """Positions in time, in chunks, that the pass uses."""
        return max(len(one) for one in self.sees)

    @property
    def shared(self) -> bool:
        """Whether all rows see the same list, so that one attention serves all."""
        return len(set(self.sees)) == 1

    @cached_property
    def index(self) -> Int[Tensor, "r m"]:
        """The rows seen, filled up with row 0."""
        return torch.tensor([(*one, *(0,) * (self.num_places - len(one))) for one in self.sees])

    @cached_property
    def seen(self) -> Bool[Tensor, "r m"]:
        """False where `index` is filled up."""
        return torch.tensor([[i < len(one) for i in range(self.num_places)] for one in self.sees])
