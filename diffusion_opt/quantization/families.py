"""Which layers of each transformer family stay in full precision, as data; `policy.py` says why such a list is needed.

A family without a list gets a general policy: all linear layers inside the blocks that repeat, but those whose names
speak of norms, modulation or embeddings. It is right for most diffusion transformers and knows none of them, so it says
that it is general.
"""

import re
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
    general: bool = False  # made from what all transformers have in common, without knowledge of this one


_TIME = "time embedding: one row a sample, steers every block"
_MODULATION = "modulation: one row a sample, scales every token of its block"
_OUTPUT = (
    Kept(r"norm_out\..*", "output modulation: one row a sample, scales every token"),
    Kept(r"proj_out", "output projection: writes the velocity"),
)
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
            "WanVACETransformer3DModel",
            (
                Kept(r"condition_embedder\..*", "time and text embedding: steers every block"),
                Kept(r"vace_blocks\.\d+\.proj_(in|out)", "projection into and out of the control stream"),
                Kept(r"proj_out", "output projection: writes the velocity"),
            ),
        ),
        LayerPolicy(
            "FluxTransformer2DModel",
            (
                Kept(r"(x|context)_embedder", "input projection: sees raw latents and text"),
                Kept(r"time_text_embed\..*", _TIME),
                Kept(r"transformer_blocks\.\d+\.norm1(_context)?\..*", _MODULATION),
                Kept(r"single_transformer_blocks\.\d+\.norm\..*", _MODULATION),
                *_OUTPUT,
            ),
        ),
        LayerPolicy(
            "QwenImageTransformer2DModel",
            (
                Kept(r"(img|txt)_in", "input projection: sees raw latents and text"),
                Kept(r"time_text_embed\..*", _TIME),
                Kept(r"transformer_blocks\.\d+\.(img|txt)_mod\..*", _MODULATION),
                *_OUTPUT,
            ),
        ),
        LayerPolicy(
            "ZImageTransformer2DModel",
            (
                Kept(r"(all_x|cap)_embedder\..*", "input projection: sees raw latents and text"),
                Kept(r"t_embedder\..*", _TIME),
                Kept(r"(noise_refiner|layers)\.\d+\.adaLN_modulation\..*", _MODULATION),
                Kept(r"(noise|context)_refiner\.\d+\..*", "refiner: prepares what every other block sees"),
                Kept(r"all_final_layer\..*", "output projection and its modulation: writes the velocity"),
            ),
        ),
        LayerPolicy(
            "PixArtTransformer2DModel",
            (
                Kept(r"adaln_single\..*", "time embedding: one row a sample, makes the modulation of every block"),
                Kept(r"caption_projection\..*", "input projection: sees the text encoder's output"),
                _OUTPUT[1],
            ),
        ),
        LayerPolicy(
            "SanaTransformer2DModel",
            (
                Kept(r"time_embed\..*", "time embedding: one row a sample, makes the modulation of every block"),
                Kept(r"caption_projection\..*", "input projection: sees the text encoder's output"),
                _OUTPUT[1],
            ),
        ),
        LayerPolicy(
            "HunyuanVideoTransformer3DModel",
            (
                Kept(r"context_embedder\..*", "refiner of the text: a few rows, seen by every block"),
                Kept(r"time_text_embed\..*", _TIME),
                Kept(r"transformer_blocks\.\d+\.norm1(_context)?\..*", _MODULATION),
                Kept(r"single_transformer_blocks\.\d+\.norm\..*", _MODULATION),
                *_OUTPUT,
            ),
        ),
        LayerPolicy(
            "HunyuanVideo15Transformer3DModel",
            (
                Kept(r"context_embedder(_2)?\..*", "refiner of the text: a few rows, seen by every block"),
                Kept(r"image_embedder\..*", "input projection: sees the image encoder's output"),
                Kept(r"time_embed\..*", _TIME),
                Kept(r"transformer_blocks\.\d+\.norm1(_context)?\..*", _MODULATION),
                *_OUTPUT,
            ),
        ),
        LayerPolicy(
            "CogVideoXTransformer3DModel",
            (
                Kept(r"patch_embed\..*", "input projection: sees raw latents and text"),
                Kept(r"(time|ofs)_embedding\..*", _TIME),
                Kept(r"transformer_blocks\.\d+\.norm[12]\..*", _MODULATION),
                *_OUTPUT,
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


def repeated_blocks(transformer: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the stack by name, in the order in which the class holds them: elements of its own lists.

    Of lists, those whose elements are of a class that diffusers calls repeated, if it names any that stand in a list.
    """
    lists = {name: child for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)}
    named = set(getattr(transformer, "_repeated_blocks", None) or ())
    chosen = {name: child for name, child in lists.items() if any(type(block).__name__ in named for block in child)}
    return {
        f"{name}.{index}": block
        for name, child in (chosen or lists).items()
        if "refiner" not in name
        for index, block in enumerate(child)
    }


def general_policy(transformer: nn.Module) -> LayerPolicy:
    """For a family that has no policy of its own: all linear layers inside its blocks, but no norm and no modulation.

    Raises ValueError for a transformer without a list of blocks.
    """
    family, blocks = type(transformer).__name__, repeated_blocks(transformer)
    if not blocks:
        raise ValueError(
            f"{family} has no quantization policy and no list of blocks that a general one could go by; there are "
            f"policies for {', '.join(POLICIES)}"
        )
    lists = "|".join(dict.fromkeys(re.escape(name.partition(".")[0]) for name in blocks))
    return LayerPolicy(
        family,
        (
            Kept(rf"(?!({lists})\.\d+\.).*", "outside the repeated blocks (general policy)"),
            Kept(
                r"(.*\.)?(\w*norm\w*|\w*mod|\w*modulation\w*|ada\w*|\w*embed\w*)(\..*)?",
                "by its name a norm, a modulation or an embedding (general policy)",
            ),
        ),
        general=True,
    )
