"""Pictures that are asked for in words: each has many prompts, and a new one is drawn each time it is seen.

A data set of this kind brings pictures, a function that words a prompt for one of them, and its size. Nothing else of
it is known outside its own module: training asks for pictures and prompts, a tokenizer for the words of many prompts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Integer
from torch import Tensor

Wording = Callable[[int, torch.Generator], str]


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures (N, 3, H, W) of bytes, in memory or mapped from a file, and `caption(index, generator)`.

    Raises ValueError for pictures of another shape or type.
    """

    pictures: Integer[Tensor, "n 3 h w"]
    caption: Wording

    def __post_init__(self) -> None:
        if self.pictures.dtype != torch.uint8 or self.pictures.ndim != 4 or self.pictures.shape[1] != 3:
            found = f"{tuple(self.pictures.shape)} of {self.pictures.dtype}"
            raise ValueError(f"pictures must be bytes (N, 3, H, W), got {found}")

    def __len__(self) -> int:
        return len(self.pictures)

    def prompts(self, number: int, seed: int = 0) -> list[str]:
        """Prompts of `number` random pictures, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [self.caption(index, generator) for index in self.indices(number, generator)]

    def indices(self, number: int, generator: torch.Generator) -> list[int]:
        """Numbers of random pictures, with repetition."""
        return torch.randint(len(self), (number,), generator=generator, device=generator.device).tolist()

    def fingerprint(self) -> str:
        """16 hex digits of the pictures: of their number, size and every hundredth of them."""
        digest = hashlib.sha256(str(tuple(self.pictures.shape)).encode())
        digest.update(self.pictures[::100].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class CaptionedDataSet:
    """A data set of captioned pictures by name: `pictures(count, seed, split, cache)` draws or reads them."""

    name: str
    image_size: int  # pixels a side
    pictures: Callable[[int, int, str, Path], CaptionedPictures]
