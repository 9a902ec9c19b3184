"""Which linear layers of a transformer are quantized, and why the others are not: one policy a family.

Not all layers are worth it, and some cannot bear it. Layers that see one row a sample (time embedding, modulation) cost
no time, yet their error reaches every token of every block: leaving modulation in full precision is worth up to 20 dB
of signal to noise in the families that have one per block. First and last projections meet raw pixels or latents.
Everything else, the attention and feed-forward linears inside the blocks, holds nearly all arithmetic and is quantized.
All methods here ask the same policy, and ask it before calibration: a layer that is quantized first and excluded later
has had its weights changed already by some algorithms (SVDQuant, for one).

NVIDIA's lists skip blocks by number, 0-2 and 45-47 of a model that has 48; here the first n and the last n are counted
from the ends of whatever stack there is. Convolutions, as in Wan's patch embedding, are never quantized: they see raw
latents, and modelopt sends a Conv3d that has NVFP4 to a kernel that only a GPU has.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from diffusion_opt.quantization.families import POLICIES, Kept, LayerPolicy, general_policy, repeated_blocks
from diffusion_opt.quantization.guards import refuse_adapters


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The policy's word on one linear layer; `reason` is empty if it is quantized."""

    name: str
    layer: nn.Linear
    reason: str

    @property
    def quantized(self) -> bool:
        return not self.reason


def policy_for(transformer: nn.Module) -> LayerPolicy:
    """The policy of a transformer's family; of an unknown one the general policy, with a warning that says so.

    Raises ValueError for a transformer that has neither a policy nor a list of blocks.
    """
    family = type(transformer).__name__
    if family in POLICIES:
        return POLICIES[family]
    policy = general_policy(transformer)
    warnings.warn(
        f"{family} has no quantization policy of its own: a general one takes all linear layers inside its blocks but "
        "norms, modulation and embeddings. Look at choose(transformer), and at sensitivity before four bits",
        stacklevel=2,
    )
    return policy


def as_tuple(name: str, strings: Sequence[str]) -> tuple[str, ...]:
    """The strings as a tuple (JSON has lists only). Raises ValueError for a single string in their place."""
    if isinstance(strings, str):
        raise ValueError(f"{name} must be a list or tuple of strings, got {strings!r}; write ({strings!r},)")
    return tuple(strings)


def choose(
    transformer: nn.Module,
    min_width: int = 0,
    skip: Sequence[str] = (),
    first_blocks: int = 0,
    last_blocks: int = 0,
) -> list[LayerChoice]:
    """The policy's word on every `nn.Linear` of a transformer, in order.

    Beyond the policy, layers with fewer than `min_width` inputs or outputs are kept, those whose whole name a regular
    expression in `skip` matches, and all of the first and the last so many blocks. Raises ValueError for an expression
    that is invalid or matches no linear layer, for more blocks than there are, and for a transformer with LoRA layers
    that are not fused.
    """
    policy = policy_for(transformer)
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    refuse_adapters(transformer, "quantize")
    kept = [*policy.kept, *(Kept(pattern, f"skipped by {pattern!r}") for pattern in _checked(skip, linears))]
    kept += _end_blocks(transformer, first_blocks, last_blocks)
    choices = []
    for name, layer in linears.items():
        reason = next((k.reason for k in kept if re.fullmatch(k.pattern, name)), "")
        width = min(layer.in_features, layer.out_features)
        if not reason and width < min_width:
            reason = f"too narrow: {width} < {min_width}"
        choices.append(LayerChoice(name, layer, reason))
    return choices


def _end_blocks(transformer: nn.Module, first: int, last: int) -> list[Kept]:
    """Patterns for the blocks at the two ends of the stack."""
    if not first and not last:
        return []
    names = {block: name for name, block in repeated_blocks(transformer).items()}
    blocks = tuple(names)
    if min(first, last) < 0 or first + last >= len(blocks):
        raise ValueError(
            f"first_blocks={first} and last_blocks={last} must be 0 or more and leave one of {len(blocks)} blocks"
        )
    ends = {**{block: "first" for block in blocks[:first]}, **{block: "last" for block in blocks[len(blocks) - last :]}}
    return [Kept(re.escape(names[block]) + r"\..*", f"in one of the {end} blocks") for block, end in ends.items()]


def _checked(patterns: Sequence[str], names: dict[str, nn.Linear]) -> Sequence[str]:
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not found:
            raise ValueError(f"{pattern!r} matches no linear layer; their names are like {', '.join(list(names)[-3:])}")
    return patterns
