"""LTX-2: video beside audio, and the tail reads both."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.models.stacks.base import BlockStack, Given, Streams


class LTX2(BlockStack):
    arguments: ClassVar = {"video": "hidden_states", "audio": "audio_hidden_states"}

    def widths_of(self, transformer: nn.Module) -> dict[str, int]:
        config = transformer.config
        return {
            "video": config.num_attention_heads * config.attention_head_dim,
            "audio": config.audio_num_attention_heads * config.audio_attention_head_dim,
        }

    def leaving(self, output: tuple[Tensor, Tensor], start: Streams) -> Streams:
        return {"video": output[0], "audio": output[1]}

    def handed_on(self, given: Given) -> tuple[Tensor, Tensor]:
        return given["hidden_states"], given["audio_hidden_states"]

    def replaced(self, output: tuple[Tensor, Tensor], end: Streams) -> tuple[Tensor, Tensor]:
        return end["video"], end["audio"]

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        block, hidden = self.blocks[0], given["hidden_states"]
        shift, scale = block.get_mod_params(block.scale_shift_table, given["temb"], len(hidden))[:2]
        return block.norm1(hidden) * (1 + scale) + shift
