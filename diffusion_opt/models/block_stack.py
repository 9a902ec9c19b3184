"""Where the block stack of a transformer begins and ends, one description for each family.

A diffusion transformer is a thin head, a thick stack of blocks and a thin tail. Families differ in which token streams
run through the stack, in what a block takes and returns, and in which streams the tail reads:

    family                    streams                               the tail reads   blocks return
    FLUX.2                    picture beside text, then in one      picture          (text, picture), then both in one
    FLUX.1, Qwen-Image        picture beside text                   picture          (text, picture)
    SD3                       picture beside text                   picture          (text, picture), (None, picture)
    HunyuanVideo, CogVideoX   clip beside text                      clip             (clip, text)
    LTX-2                     video beside audio                    both             (video, audio)
    Wan, LTX                  video                                 video            video
    PixArt, Sana              picture                               picture          picture
    Z-Image                   picture and text in one               both             both in one

Whoever cuts at the stack needs no more than this, and a family is added by one small class in `stacks`. diffusers' own
block caches keep instead a registry of argument names and return positions for each block class
(`TransformerBlockRegistry`), which cannot say that a stack has two kinds of block (FLUX.2) or two streams that count
(LTX-2).
"""

import diffusers
from torch import nn

from diffusion_opt.models.stacks.base import BlockStack, Given, Streams
from diffusion_opt.models.stacks.flux import Flux, Flux2
from diffusion_opt.models.stacks.ltx2 import LTX2
from diffusion_opt.models.stacks.one_stream import LTX, PixArt, Sana, Wan, ZImage
from diffusion_opt.models.stacks.text_beside import SD3, CogVideoX, HunyuanVideo, HunyuanVideo15, QwenImage

FAMILIES: dict[type[nn.Module], type[BlockStack]] = {
    diffusers.Flux2Transformer2DModel: Flux2,
    diffusers.LTX2VideoTransformer3DModel: LTX2,
    diffusers.WanTransformer3DModel: Wan,
    diffusers.LTXVideoTransformer3DModel: LTX,
    diffusers.SD3Transformer2DModel: SD3,
    diffusers.FluxTransformer2DModel: Flux,
    diffusers.QwenImageTransformer2DModel: QwenImage,
    diffusers.HunyuanVideoTransformer3DModel: HunyuanVideo,
    diffusers.HunyuanVideo15Transformer3DModel: HunyuanVideo15,
    diffusers.CogVideoXTransformer3DModel: CogVideoX,
    diffusers.PixArtTransformer2DModel: PixArt,
    diffusers.SanaTransformer2DModel: Sana,
    diffusers.ZImageTransformer2DModel: ZImage,
}

__all__ = ["FAMILIES", "BlockStack", "Given", "Streams", "block_stack"]


def block_stack(transformer: object) -> BlockStack:
    """The stack of a transformer. Raises ValueError for a class without a description here, and for an empty stack."""
    for family, stack in FAMILIES.items():
        if isinstance(transformer, family):
            return stack(transformer)
    hint = " (apply a step cache before torch.compile)" if hasattr(transformer, "_orig_mod") else ""
    known = ", ".join(family.__name__ for family in FAMILIES)
    raise ValueError(f"step caches know {known}, got {type(transformer).__name__}{hint}")
