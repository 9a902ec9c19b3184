"""Where the block stack of a transformer begins and ends, one description for each family.

A diffusion transformer is a thin head, a thick stack of blocks and a thin tail. Families differ in which token streams
run through the stack, in what a block takes and returns, and in which streams the tail reads:

    FLUX.2   image beside text, then both in one fused stream   tail: image     blocks return (text, image), then fused
    SD3      image beside text                                  tail: image     (text, image), the last (None, image)
    LTX-2    video beside audio                                 tail: both      (video, audio)
    Wan, LTX video                                              tail: video     video

Whoever cuts at the stack needs no more than this, and a family is added by one small class here. diffusers' own block
caches keep instead a registry of argument names and return positions for each block class
(`TransformerBlockRegistry`), which cannot say that a stack has two kinds of block (FLUX.2) or two streams that count
(LTX-2). What a block is given comes as a dictionary from argument name to value.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import (
    Flux2Transformer2DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from jaxtyping import Float
from torch import Tensor, nn

Streams = dict[str, Float[Tensor, "b ..."]]  # (b, n, d) by name, each with its own number of tokens and width
Given = dict[str, Any]  # arguments of a block or of the transformer, by name


class BlockStack(ABC):
    """The stack of a family whose blocks hand on one stream; the other families override what differs."""

    arguments: ClassVar = {
        "hidden": "hidden_states"
    }  # of a block, by the stream that the tail reads; the main one first
    timestep_scale = 1000  # what the transformer calls the time 1

    def __init__(self, transformer: nn.Module) -> None:
        self.blocks: tuple[nn.Module, ...] = self.blocks_of(transformer)
        if not self.blocks:
            raise ValueError(f"this {type(transformer).__name__} has no blocks, so there is no stack to cut")
        self.widths = self.widths_of(transformer)

    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        """All blocks in the order in which they run."""
        return tuple(transformer.transformer_blocks)

    def widths_of(self, transformer: nn.Module) -> dict[str, int]:
        """Width d of each stream that the tail reads."""
        config = transformer.config
        return {"hidden": config.num_attention_heads * config.attention_head_dim}

    def time(self, timestep: Float[Tensor, "*s"]) -> float | None:
        """Time in [0, 1] of a call; None if its samples are at different times.

        A `timestep` (b, n) gives each token its own time, as with a clean first frame; the noisiest counts.
        """
        times = timestep.reshape(len(timestep), -1).amax(1) if timestep.ndim else timestep.reshape(1)
        return float(times[0]) / self.timestep_scale if bool((times == times[0]).all()) else None

    def refusal(self, call: Given) -> str | None:
        """Why a call with these arguments must not be cached at all."""
        return None

    def is_ordinary(self, call: Given) -> bool:
        """Whether a call runs the whole stack."""
        return True

    def entering(self, given: Given) -> Streams:
        """The streams that the tail reads, as they enter block 0."""
        return {name: given[argument] for name, argument in self.arguments.items()}

    def leaving(self, output: Any, start: Streams) -> Streams:
        """The same streams in the output of a block; `start` is how they entered block 0."""
        return {"hidden": output}

    def handed_on(self, given: Given) -> Any:
        """What a block would return that changed nothing."""
        return given["hidden_states"]

    def replaced(self, output: Any, end: Streams) -> Any:
        """A block's output with `end` in the place of the streams that the tail reads."""
        return end["hidden"]

    @abstractmethod
    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        """The main stream as block 0's attention sees it: normalized, then scaled and shifted by the time."""


class _LTX(BlockStack):
    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        hidden, temb, table = given["hidden_states"], given["temb"], self.blocks[0].scale_shift_table
        values = table + temb.reshape(len(hidden), temb.shape[1], len(table), -1)
        return self.blocks[0].norm1(hidden) * (1 + values[:, :, 1]) + values[:, :, 0]


class _Wan(BlockStack):
    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        return tuple(transformer.blocks)

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        hidden = given["hidden_states"]
        values = self.blocks[0].scale_shift_table + given["temb"].float()  # (b, 6, d), or (b, n, 6, d) by token
        shift, scale = values.select(-2, 0), values.select(-2, 1)
        if values.ndim == 3:
            shift, scale = shift[:, None], scale[:, None]
        return (self.blocks[0].norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)


class _LTX2(BlockStack):
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


class _SD3(BlockStack):
    def is_ordinary(self, call: Given) -> bool:
        return not call.get("skip_layers")  # the extra pass of skip-layer guidance leaves blocks out on purpose

    def leaving(self, output: tuple[Tensor | None, Tensor], start: Streams) -> Streams:
        return {"hidden": output[1]}

    def handed_on(self, given: Given) -> tuple[Tensor, Tensor]:
        return given["encoder_hidden_states"], given["hidden_states"]

    def replaced(self, output: tuple[Tensor, Tensor], end: Streams) -> tuple[None, Tensor]:
        return None, end["hidden"]

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        return self.blocks[0].norm1(given["hidden_states"], emb=given["temb"])[0]


class _Flux2(BlockStack):
    timestep_scale = 1

    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
        if not (len(double) and len(single)):
            raise ValueError(
                f"the stack must begin with a double and end with a single block, got {len(double)} + {len(single)}"
            )
        return (*double, *single)

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


_FAMILIES: dict[type[nn.Module], type[BlockStack]] = {
    Flux2Transformer2DModel: _Flux2,
    LTX2VideoTransformer3DModel: _LTX2,
    WanTransformer3DModel: _Wan,
    LTXVideoTransformer3DModel: _LTX,
    SD3Transformer2DModel: _SD3,
}


def block_stack(transformer: object) -> BlockStack:
    """The stack of a transformer. Raises ValueError for a class without a description here, and for an empty stack."""
    for family, stack in _FAMILIES.items():
        if isinstance(transformer, family):
            return stack(transformer)
    hint = " (apply a step cache before torch.compile)" if hasattr(transformer, "_orig_mod") else ""
    known = ", ".join(family.__name__ for family in _FAMILIES)
    raise ValueError(f"step caches know {known}, got {type(transformer).__name__}{hint}")
