"""What the slots of a region cache will take, before anything runs.

    slot = 2 S d_kv x bytes per number  (K and V of S tokens; d_kv summed over the attention layers)
         + S_moving (c_in + c_out) x bytes of the model's type  (input and velocity of each token that may be skipped)

times the contexts (two with two-pass guidance), times the steps if the slots outlive a generation (streaming). At fp8 a
scale is kept for each token and head. On a large model this is gigabytes: the table is meant to be read before a run,
and precision and offload chosen by it. Sizes of real models are data below, from the classes' configurations; `size_of`
reads them off a loaded transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from diffusion_opt.caching.region.families import family_of
from diffusion_opt.caching.region.slots import PRECISIONS, SCALE_BYTES, Precision, check_precision

TYPE_BYTES = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What decides the size of a slot."""

    name: str
    layers: tuple[tuple[int, int], ...]  # (heads, head width) of K and V in each attention layer over these tokens
    num_tokens: int  # that may be skipped
    num_text: int  # that are in the same attention and always computed
    channels: int  # of model input and output together, for each token
    source: str
    native_bytes: int = 2  # a number at the model's own precision


MODEL_SIZES = {
    size.name: size
    for size in (
        ModelSize(
            "FLUX.2-dev 1024x1024",
            ((48, 128),) * 56,
            num_tokens=4096,
            num_text=512,
            channels=256,
            source="defaults of diffusers' Flux2Transformer2DModel: 8 + 48 blocks; 16x16 pixels a token, 512 of text",
        ),
        ModelSize(
            "LTX-2 768x512, 121 frames",
            ((32, 128), (32, 64)) * 48,
            num_tokens=6144,
            num_text=0,
            channels=256,
            source="defaults of diffusers' LTX2VideoTransformer3DModel: 48 blocks, each with the video's own attention "
            "and that of audio over video; 16 x 16 x 24 latent tokens",
        ),
        ModelSize(
            "Wan2.1-1.3B 832x480, 81 frames",
            ((12, 128),) * 30,
            num_tokens=32760,
            num_text=0,
            channels=128,
            source="configuration of Wan2.1-T2V-1.3B in diffusers' convert_wan_to_diffusers.py; 21 x 30 x 52 tokens",
        ),
        ModelSize(
            "Wan2.1-14B 1280x720, 81 frames",
            ((40, 128),) * 40,
            num_tokens=75600,
            num_text=0,
            channels=128,
            source="defaults of diffusers' WanTransformer3DModel: 40 blocks; 21 x 45 x 80 tokens",
        ),
    )
}


def size_of(transformer: nn.Module, num_tokens: int, num_text: int = 0) -> ModelSize:
    """The size of a loaded transformer at a number of tokens, `num_text` of text beside them in the same attention.

    Raises ValueError for a class that the region cache does not know.
    """
    attentions = family_of(transformer).attentions()
    config, native_bytes = transformer.config, next(transformer.parameters()).element_size()
    patch = config.patch_size if isinstance(config.patch_size, (tuple, list)) else (1,)
    volume = 1
    for step in patch:
        volume *= step
    return ModelSize(
        type(transformer).__name__,
        tuple((layer.heads, _kv_width(layer) // layer.heads) for layer in attentions),
        num_tokens,
        num_text,
        channels=volume * (config.in_channels + (config.out_channels or config.in_channels)),
        source="configuration of the loaded transformer",
        native_bytes=native_bytes,
    )


def _kv_width(layer: nn.Module) -> int:
    return getattr(layer, "inner_kv_dim", layer.inner_dim)


def slot_bytes(size: ModelSize, precision: Precision = "native", contexts: int = 1, steps: int = 1) -> int:
    """Bytes of all slots: `contexts` passes per step, `steps` kept (1 unless streaming). Batch 1; multiply by it.

    Raises ValueError for an unknown precision or a count below 1.
    """
    check_precision(precision)
    if contexts < 1 or steps < 1:
        raise ValueError(f"contexts and steps must be 1 or more, got {contexts} and {steps}")
    stored = TYPE_BYTES.get(precision, size.native_bytes)
    scales = SCALE_BYTES if precision == "fp8" else 0
    per_token = sum(2 * heads * (width * stored + scales) for heads, width in size.layers)
    kept = size.num_tokens * size.channels * size.native_bytes
    return contexts * steps * ((size.num_tokens + size.num_text) * per_token + kept)


def slot_table(
    sizes: Sequence[ModelSize] = tuple(MODEL_SIZES.values()), contexts: int = 1, steps: Sequence[int] = (1, 4, 8)
) -> str:
    """A table of gigabytes (10^9) by model, precision and steps kept, for batch 1."""
    width = max(len(size.name) for size in sizes)
    heads = " ".join(f"{f'{precision} x{num}':>10}" for precision in PRECISIONS for num in steps)
    lines = [f"{'slots in GB, precision x steps kept':<{width}} {heads}"]
    for size in sizes:
        cells = (slot_bytes(size, p, contexts, n) / 1e9 for p in PRECISIONS for n in steps)
        lines.append(f"{size.name:<{width}} " + " ".join(f"{cell:>10.3g}" for cell in cells))
    return "\n".join(lines)
