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
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from diffusion_opt.models.block_stack import block_stack
from diffusion_opt.quantization.guards import refuse_adapters


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


_LTX_EMBEDDERS = (
    Kept(r"proj_in", "input projection: sees raw latents"),
    Kept(r"caption_projection\..*", "input projection: sees the text encoder's output"),
    Kept(r"time_embed\..*", "time embedding: one row a sample, makes the modulation of every block"),
    Kept(r"proj_out", "output projection: writes the velocity"),
)

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
        LayerPolicy(
            "LTX2VideoTransformer3DModel",
            (
                *_LTX_EMBEDDERS,
                Kept(r"audio_proj_in", "input projection: sees raw latents of sound"),
                Kept(r"audio_caption_projection\..*", "input projection: sees the text encoder's output"),
                Kept(r"audio_time_embed\..*", "time embedding: one row a sample, makes the modulation of every block"),
                Kept(r"av_cross_attn_(video|audio)_(scale_shift|a2v_gate|v2a_gate)\..*",
                     "modulation between video and sound: one row a sample"),
                Kept(r"audio_proj_out", "output projection: writes the velocity of sound"),
            ),
        ),
        LayerPolicy("LTXVideoTransformer3DModel", _LTX_EMBEDDERS),
        LayerPolicy(
            "WanTransformer3DModel",
            (
                Kept(r"condition_embedder\..*", "time and text embedding: steers every block"),
                Kept(r"proj_out", "output projection: writes the velocity"),
            ),
        ),
        LayerPolicy(
            "SD3Transformer2DModel",
            (
                Kept(r"context_embedder", "input projection: sees the text encoders' output"),
                Kept(r"time_text_embed\..*", "time embedding: one row a sample, steers every block"),
                Kept(r"transformer_blocks\.\d+\.norm1(_context)?\..*",
                     "modulation: one row a sample, scales every token of its block"),
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


def choose(
    transformer: nn.Module,
    min_width: int = 0,
    skip: Sequence[str] = (),
    first_blocks: int = 0,
    last_blocks: int = 0,
) -> list[LayerChoice]:
    """The policy's word on every `nn.Linear` of a transformer, in order.

    Beyond the policy, layers with fewer than `min_width` inputs or outputs are kept, those whose whole name a regular
    expression in `skip` matches, and all of the first and the last so many blocks. Raises ValueError for a family
    without policy, for an expression that is invalid or matches no linear layer, for more blocks than there are, and
    for a transformer with LoRA layers that are not fused.
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
    blocks = block_stack(transformer).blocks
    if min(first, last) < 0 or first + last >= len(blocks):
        raise ValueError(
            f"first_blocks={first} and last_blocks={last} must be 0 or more and leave one of {len(blocks)} blocks"
        )
    names = {module: name for name, module in transformer.named_modules()}
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
