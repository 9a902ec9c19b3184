"""What whoever cuts at a block stack must know of a family.

The three classes here cover the three forms in which blocks hand streams on: one stream, a text stream beside it, and
whatever a family makes of it. What a block or the transformer is given comes as a dictionary from argument name to
value.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float, Shaped
from torch import Tensor, nn

Streams = dict[str, Float[Tensor, "b ..."]]  # (b, n, d) by name, each with its own number of tokens and width
Given = dict[str, Any]  # arguments of a block or of the transformer, by name


class BlockStack(ABC):
    """The stack of a family whose blocks hand on one stream; the other families override what differs."""

    arguments: ClassVar = {
        "hidden": "hidden_states"
    }  # of a block, by the stream that the tail reads; the main one first
    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)  # attributes that hold the blocks, in running order
    timestep_scale: float = 1000  # what the transformer calls the time 1

    def __init__(self, transformer: nn.Module) -> None:
        self.blocks: tuple[nn.Module, ...] = self.blocks_of(transformer)
        if not self.blocks:
            raise ValueError(f"this {type(transformer).__name__} has no blocks, so there is no stack to cut")
        self.widths = self.widths_of(transformer)

    def blocks_of(self, transformer: nn.Module) -> tuple[nn.Module, ...]:
        """All blocks in the order in which they run."""
        return tuple(block for name in self.lists for block in getattr(transformer, name))

    def widths_of(self, transformer: nn.Module) -> dict[str, int]:
        """Width d of each stream that the tail reads."""
        config = transformer.config
        return {"hidden": config.num_attention_heads * config.attention_head_dim}

    def sample(self, call: Given) -> Float[Tensor, "b *s"]:
        """What a call denoises, with the pictures that some pipelines put beside it; of LTX-2 the video."""
        return call["hidden_states"]

    def result(self, output: Any) -> Float[Tensor, "b *s"]:
        """What a call returned for it: the first thing in the output."""
        return output[0]

    def time_of(self, call: Given) -> float | None:
        """Time in [0, 1] of a call; None if its samples are at different times."""
        return self.time(call["timestep"])

    def time(self, timestep: Shaped[Tensor, "*s"]) -> float | None:
        """Time in [0, 1] of a `timestep` argument; None if its samples are at different times.

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
        return given[self.arguments["hidden"]]

    def replaced(self, output: Any, end: Streams) -> Any:
        """A block's output with `end` in the place of the streams that the tail reads."""
        return end["hidden"]

    @abstractmethod
    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        """The main stream as block 0's attention sees it: normalized, then scaled and shifted by the time."""


class TextBeside(BlockStack):
    """Blocks that take the text beside the main stream and return both, here (main, text)."""

    text_first: ClassVar[bool] = False  # True: they return (text, main)

    def pair(self, main: Tensor, text: Tensor | None) -> tuple[Tensor | None, ...]:
        """Both streams in the order of the blocks."""
        return (text, main) if self.text_first else (main, text)

    def leaving(self, output: tuple[Tensor | None, ...], start: Streams) -> Streams:
        return {"hidden": output[1 if self.text_first else 0]}

    def handed_on(self, given: Given) -> tuple[Tensor | None, ...]:
        return self.pair(given["hidden_states"], given["encoder_hidden_states"])

    def replaced(self, output: tuple[Tensor | None, ...], end: Streams) -> tuple[Tensor | None, ...]:
        return self.pair(end["hidden"], output[0 if self.text_first else 1])

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        return self.blocks[0].norm1(given["hidden_states"], emb=given["temb"])[0]


class SharedModulation(BlockStack):
    """Blocks that are given six shifts, scales and gates by one network for all, and add a table of their own."""

    def modulated(self, given: Given) -> Float[Tensor, "b n d"]:
        block, hidden = self.blocks[0], given["hidden_states"]
        values = block.scale_shift_table[None] + given["timestep"].reshape(len(hidden), 6, -1)
        return (block.norm1(hidden) * (1 + values[:, 1:2]) + values[:, 0:1]).to(hidden.dtype)
