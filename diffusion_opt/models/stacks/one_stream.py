"""Families whose blocks hand on one stream: Wan, LTX-Video, PixArt, Sana and Z-Image.

The text is read by cross-attention and never changes, but in Z-Image, where it stands behind the picture in the same
sequence and the tail reads all of it.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.models.stacks.base import BlockStack, Given, SharedModulation


class LTX(BlockStack):
    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        hidden, temb, table = given["hidden_states"], given["temb"], self.blocks[0].scale_shift_table
        values = table + temb.reshape(len(hidden), temb.shape[1], len(table), -1)
        return self.blocks[0].norm1(hidden) * (1 + values[:, :, 1]) + values[:, :, 0]


class Wan(BlockStack):
    lists = ("blocks",)

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        hidden = given["hidden_states"]
        values = self.blocks[0].scale_shift_table + given["temb"].float()  # (b, 6, d), or (b, n, 6, d) by token
        shift, scale = values.select(-2, 0), values.select(-2, 1)
        if values.ndim == 3:
            shift, scale = shift[:, None], scale[:, None]
        return (self.blocks[0].norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)


class PixArt(SharedModulation):
    """Alpha and Sigma."""


class Sana(SharedModulation):
    """Sprint's few steps have times of another kind and nothing to save, so it is refused."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        if transformer.config.guidance_embeds:
            raise ValueError("Sana-Sprint makes 1 to 4 steps, of which a step cache has none to skip")
        self.timestep_scale = 1000 * transformer.config.timestep_scale


class ZImage(BlockStack):
    """Samples come and go as lists; the transformer calls the clean end 1."""

    arguments: ClassVar = {"hidden": "x"}
    lists = ("layers",)
    timestep_scale = 1

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        if transformer.config.siglip_feat_dim is not None:
            raise ValueError("Z-Image-Omni mixes pictures of different times in one sequence, which has no single time")

    def widths_of(self, transformer: nn.Module) -> dict[str, int]:
        return {"hidden": transformer.config.dim}

    def sample(self, call: Given) -> Float[Tensor, "b *s"]:
        return torch.stack(call["x"])

    def result(self, output: tuple[list[Tensor]]) -> Float[Tensor, "b *s"]:
        return torch.stack(output[0])

    def time_of(self, call: Given) -> float | None:
        return self.time(1 - call["t"])

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        block = self.blocks[0]
        scale = block.adaLN_modulation(given["adaln_input"]).chunk(4, dim=1)[0]
        return block.attention_norm1(given["x"]) * (1 + scale[:, None])
