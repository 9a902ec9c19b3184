"""Families whose blocks all take the text beside the picture or clip: SD3, Qwen-Image, CogVideoX and HunyuanVideo."""

from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.models.stacks.base import Given, Streams, TextBeside


class SD3(TextBeside):
    """The last block returns no text."""

    text_first = True

    def is_ordinary(self, call: Given) -> bool:
        return not call.get("skip_layers")  # the extra pass of skip-layer guidance leaves blocks out on purpose

    def replaced(self, output: tuple[Tensor | None, Tensor], end: Streams) -> tuple[None, Tensor]:
        return None, end["hidden"]


class QwenImage(TextBeside):
    """With given pictures the edited one's tokens come first, and the others may have the time 0."""

    text_first = True
    timestep_scale = 1

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        block = self.blocks[0]
        shift_scale_gate = block.img_mod(given["temb"]).chunk(2, dim=-1)[0]
        normed = block.img_norm1(given["hidden_states"])
        return block._modulate(normed, shift_scale_gate, given.get("modulate_index"))[0]


class CogVideoX(TextBeside):
    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        return self.blocks[0].norm1(given["hidden_states"], given["encoder_hidden_states"], given["temb"])[0]


class HunyuanVideo(TextBeside):
    """Double and single blocks return the same pair. A first frame that is given may have a modulation of its own."""

    lists = ("transformer_blocks", "single_transformer_blocks")

    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        if not len(transformer.transformer_blocks):
            raise ValueError("the stack must begin with a double block, got none")
        return super().blocks_of(transformer)

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        if "token_replace_emb" not in given:
            return super().modulated(given)
        frame = given["token_replace_emb"], given["num_tokens"]
        return self.blocks[0].norm1(given["hidden_states"], given["temb"], *frame)[0]


class HunyuanVideo15(TextBeside):
    """Double blocks only."""
