"""Portraits of the test split with their exact pictures, prompts that name everything, and prompts that name a part."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion_opt.datasets.portraits import Portrait, draw_many, partial_prompt, prompt, sample


@dataclass(frozen=True)
class Drawn:
    portraits: list[Portrait]
    pixels: Tensor  # uint8
    everything: list[str]  # prompts
    partly: list[str]

    @property
    def pictures(self) -> Tensor:
        return self.pixels.float() / 127.5 - 1


@pytest.fixture(scope="session")
def drawn() -> Drawn:
    portraits = sample(50, 77, "test") + sample(10, 77, "held_out")
    generator = torch.Generator().manual_seed(0)
    everything = [prompt(p, frozenset({"style", *p.attributes()})) for p in portraits]
    partly = [partial_prompt(p, generator)[0] for p in portraits]
    return Drawn(portraits, draw_many(portraits), everything, partly)
