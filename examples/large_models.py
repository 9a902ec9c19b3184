"""What a distillation run has to know of FLUX.2, Wan and LTX-2: sizes, shapes, how text and latents come in.

`arguments` are those of the published configurations (read off diffusers' conversion scripts), so that a network of
that shape can be built without its weights and without the network. `tiny` replaces some of them for a dry run: the
same class, the same code, random weights. Shapes are of one sample in the latent space where noise is added:

    FLUX.2   (32, 128, 128)                1024 x 1024 pixels; 2 x 2 latents are one token
    Wan      (16, 21, 60, 104)             81 frames of 480 x 832; 1 x 2 x 2 latents are one token
    LTX-2    (128, 16, 16, 24), (126, 128) 121 frames of 512 x 768 with sound; each latent is a token
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    LTX2VideoTransformer3DModel,
    ModelMixin,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition, Condition
from diffusion_opt.models import Flux2Velocity, PixelShuffleVAE, TokenCondition
from diffusion_opt.models.ltx2 import LTX2Velocity
from diffusion_opt.models.prompt_table import PromptTable
from diffusion_opt.models.wan import WanVelocity

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Large:
    """A model family at its published size and at a tiny one."""

    transformer: type[ModelMixin]
    velocity: Callable[[ModelMixin, PromptTable | None, tuple[Shape, ...]], nn.Module]
    encode: Callable[[DiffusionPipeline, list[str]], Tensor]  # prompts -> (P, L, D)
    shapes: tuple[Shape, ...]
    text: tuple[int, int]  # tokens and their width
    tiny: dict[str, Any]
    tiny_shapes: tuple[Shape, ...]
    tiny_text: tuple[int, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    two_time: bool = False  # whether a stock transformer has a slot for a second time

    def build(self, tiny: bool) -> ModelMixin:
        """A transformer with random weights (or none, under the meta device or fake tensors)."""
        return self.transformer(**self.arguments | (self.tiny if tiny else {}))


class Flux2Latents(Flux2Velocity):
    """Computes in the precision of its weights: noise and times are drawn in float32."""

    def tokens(self, condition: ClassCondition | TokenCondition) -> Tensor:
        return super().tokens(condition).to(self.transformer.dtype)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, r: Tensor | None = None) -> Tensor:
        return super().forward(x_t.to(self.transformer.dtype), t, condition, r).to(x_t.dtype)


def _flux2(transformer: ModelMixin, prompts: PromptTable | None, shapes: tuple[Shape, ...]) -> Flux2Latents:
    packing = PixelShuffleVAE(in_channels=shapes[0][0], block_out_channels=(1,))  # factor 1: latents stay as they are
    return Flux2Latents(transformer, prompts, packing)


def _wan(transformer: ModelMixin, prompts: PromptTable | None, shapes: tuple[Shape, ...]) -> WanVelocity:
    return WanVelocity(transformer, prompts)


def _ltx2(transformer: ModelMixin, prompts: PromptTable | None, shapes: tuple[Shape, ...]) -> LTX2Velocity:
    return LTX2Velocity(transformer, *shapes, prompts)


def _flux2_text(pipe: DiffusionPipeline, prompts: list[str]) -> Tensor:
    return torch.cat([pipe.encode_prompt(prompt=[prompt])[0] for prompt in prompts])


def _wan_text(pipe: DiffusionPipeline, prompts: list[str]) -> Tensor:
    encoded = (pipe.encode_prompt([prompt], do_classifier_free_guidance=False) for prompt in prompts)
    return torch.cat([tokens for tokens, _ in encoded])


def _ltx2_text(pipe: DiffusionPipeline, prompts: list[str]) -> Tensor:
    """Both streams side by side; the connectors put registers in the place of padding, so no mask is left."""
    both = []
    for prompt in prompts:
        tokens, mask, _, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False)
        video, sound, _ = pipe.connectors(tokens, mask, padding_side=pipe.tokenizer.padding_side)
        both.append(torch.cat([video, sound], dim=-1))
    return torch.cat(both)


MODELS: dict[str, Large] = {
    "black-forest-labs/FLUX.2-klein-base-4B": Large(
        Flux2Transformer2DModel, _flux2, _flux2_text,
        arguments={
            "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
            "guidance_embeds": False,
        },
        shapes=((32, 128, 128),), text=(512, 7680), two_time=True,
        tiny={
            "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 32,
        },
        tiny_shapes=((4, 8, 8),), tiny_text=(5, 24),
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Large(
        WanTransformer3DModel, _wan, _wan_text,
        arguments={"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
        shapes=((16, 21, 60, 104),), text=(226, 4096),
        tiny={
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48, "in_channels": 4,
            "out_channels": 4, "text_dim": 24, "freq_dim": 32, "rope_max_seq_len": 16,
        },
        tiny_shapes=((4, 3, 4, 4),), tiny_text=(5, 24),
    ),
    "Lightricks/LTX-2": Large(
        LTX2VideoTransformer3DModel, _ltx2, _ltx2_text,
        shapes=((128, 16, 16, 24), (126, 128)), text=(1024, 2 * 3840),
        tiny={
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 24,
            "rope_double_precision": False,
        },
        tiny_shapes=((8, 3, 2, 2), (7, 4)), tiny_text=(5, 2 * 24),
    ),
}  # fmt: skip
