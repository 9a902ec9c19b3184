"""FLUX.1 and FLUX.2: double blocks with the text beside the picture, then single blocks with both in one sequence.

FLUX.1's single blocks join the two and part them again, so each block returns (text, picture). FLUX.2 joins them once,
and its single blocks hand on the whole sequence, text in front.
"""

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.models.stacks.base import BlockStack, Given, Streams, TextBeside

LISTS = ("transformer_blocks", "single_transformer_blocks")


def check_both_kinds(transformer: nn.Module) -> None:
    """Raise ValueError unless a stack begins with a double and ends with a single block."""
    double, single = (len(getattr(transformer, name)) for name in LISTS)
    if not (double and single):
        raise ValueError(f"the stack must begin with a double and end with a single block, got {double} + {single}")


class Flux(TextBeside):
    lists = LISTS
    text_first = True
    timestep_scale = 1

    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        check_both_kinds(transformer)
        return super().blocks_of(transformer)


class Flux2(BlockStack):
    lists = LISTS
    timestep_scale = 1

    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        check_both_kinds(transformer)
        return super().blocks_of(transformer)

    def refusal(self, call: Given) -> str | None:
        mode = call.get("kv_cache_mode")
        return None if mode is None else f"a step cache does not go with kv_cache_mode={mode!r}: remove one"

    def leaving(self, output: tuple[Tensor, Tensor] | Tensor, start: Streams) -> Streams:
        if isinstance(output, tuple):
            return {"hidden": output[1]}
        return {"hidden": output[:, -start["hidden"].shape[1] :]}  # text tokens stand in front in the fused stream

    def handed_on(self, given: Given) -> tuple[Tensor, Tensor] | Tensor:
        text = given["encoder_hidden_states"]  # single blocks get the fused stream, and None here
        return given["hidden_states"] if text is None else (text, given["hidden_states"])

    def replaced(self, output: tuple[Tensor, Tensor] | Tensor, end: Streams) -> tuple[Tensor, Tensor] | Tensor:
        if isinstance(output, tuple):
            return output[0], end["hidden"]
        text = output[:, : -end["hidden"].shape[1]]
        return torch.cat([text, end["hidden"]], dim=1)

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        shift, scale, _ = Flux2Modulation.split(given["temb_mod_img"], 2)[0]
        return (1 + scale) * self.blocks[0].norm1(given["hidden_states"]) + shift
