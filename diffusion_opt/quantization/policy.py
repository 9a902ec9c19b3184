"""Which linear layers of a transformer are quantized, and why the others are not: one policy a family.

Not all layers are worth it, and some cannot bear it. Layers that see one row a sample (time embedding, modulation) cost
no time, yet their error reaches every token of every block: leaving modulation in full precision is worth up to 20 dB
of signal to noise in the families that have one per block. First and last projections meet raw pixels or latents.
Everything else, the attention and feed-forward linears inside the blocks, holds nearly all arithmetic and is quantized.
All methods here ask the same policy, and ask it before calibration: a layer that is quantized first and excluded later
has had its weights changed already by some algorithms (SVDQuant, for one).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Kept:
    """Layers that stay in full precision: a pattern that must match the whole name, and the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """What of a transformer family is kept; every other `nn.Linear` is quantized."""

    family: str
    kept: tuple[Kept, ...]


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The policy's word on one linear layer; `reason` is empty if it is quantized."""

    name: str
    layer: nn.Linear
    reason: str

    @property
    def quantized(self) -> bool:
        return not self.reason


POLICIES = {
    policy.family: policy
    for policy in (
        LayerPolicy(
            "Flux2Transformer2DModel",
            (
                Kept(r"(x|context)_embedder", "input projection: sees raw latents and text"),
                Kept(r"time_guidance_embed\..*", "time embedding: one row a sample, steers every block"),
                Kept(r"(double_stream_modulation_(img|txt)|single_stream_modulation)\..*",
                     "modulation: one row a sample, scales every token of every block"),
                Kept(r"norm_out\..*", "output modulation: one row a sample, scales every token"),
                Kept(r"proj_out", "output projection: writes the velocity"),
            ),
        ),
    )
}  # fmt: skip


def policy_for(transformer: nn.Module) -> LayerPolicy:
    """The policy of a transformer's family. Raises ValueError for a family that has none yet."""
    family = type(transformer).__name__
    if family not in POLICIES:
        raise ValueError(f"no quantization policy for {family} yet; there is one for {', '.join(POLICIES)}")
    return POLICIES[family]


def as_tuple(name: str, strings: Sequence[str]) -> tuple[str, ...]:
    """The strings as a tuple (JSON has lists only). Raises ValueError for a single string in their place."""
    if isinstance(strings, str):
        raise ValueError(f"{name} must be a list or tuple of strings, got {strings!r}; write ({strings!r},)")
    return tuple(strings)


def choose(transformer: nn.Module, min_width: int = 0, skip: Sequence[str] = ()) -> list[LayerChoice]:
    """The policy's word on every `nn.Linear` of a transformer, in order.

    Beyond the policy, layers with fewer than `min_width` inputs or outputs are kept, and those whose whole name a
    regular expression in `skip` matches. Raises ValueError for a family without policy, for an expression that is
    invalid or matches no linear layer, and for a transformer with LoRA layers that are not fused.
    """
    policy = policy_for(transformer)
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    adapters = [name for name in linears if ".lora_" in name]
    if adapters:
        raise ValueError(f"{adapters[0]} is a LoRA layer: fuse it with pipe.fuse_lora() before you quantize")
    kept = [*policy.kept, *(Kept(pattern, f"skipped by {pattern!r}") for pattern in _checked(skip, linears))]
    choices = []
    for name, layer in linears.items():
        reason = next((k.reason for k in kept if re.fullmatch(k.pattern, name)), "")
        width = min(layer.in_features, layer.out_features)
        if not reason and width < min_width:
            reason = f"too narrow: {width} < {min_width}"
        choices.append(LayerChoice(name, layer, reason))
    return choices


def _checked(patterns: Sequence[str], names: dict[str, nn.Linear]) -> Sequence[str]:
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not found:
            raise ValueError(f"{pattern!r} matches no linear layer; their names are like {', '.join(list(names)[-3:])}")
    return patterns
