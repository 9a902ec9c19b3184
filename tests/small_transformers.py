"""Small transformers of the five families the caches know, the arguments of one pass, and pipelines around them.

Each is a stock diffusers class with small numbers, filled so that its output is not zero and changes with the time.
Sizes differ wherever they can (batch 2, heads 2, 12 or 16 tokens, 5 of text), so that a mixed-up axis cannot pass. The
pipelines are diffusers' own, called with ready prompt embeddings: no text encoder, no tokenizer, no decoder.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import small_pipelines
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

FAMILIES = ("flux2", "ltx2", "wan", "ltx", "sd3")
TIMESTEP_SCALE = {"flux2": 1, "ltx2": 1000, "wan": 1000, "ltx": 1000, "sd3": 1000}
TEXT_TOKENS, TEXT_DIM = 5, 24


def _flux2(blocks: int) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=blocks - blocks // 2, num_single_layers=blocks // 2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT_DIM, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip


def _ltx2(blocks: int) -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=blocks, caption_channels=TEXT_DIM, rope_double_precision=False,
    )  # fmt: skip


def _wan(blocks: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=TEXT_DIM, freq_dim=32, ffn_dim=48, num_layers=blocks, rope_max_seq_len=16,
    )  # fmt: skip


def _ltx(blocks: int) -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=blocks, caption_channels=TEXT_DIM,
    )  # fmt: skip


def _sd3(blocks: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=blocks, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT_DIM, caption_projection_dim=32, pooled_projection_dim=20,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


_BUILD: dict[str, Callable[[int], ModelMixin]] = {
    "flux2": _flux2, "ltx2": _ltx2, "wan": _wan, "ltx": _ltx, "sd3": _sd3,
}  # fmt: skip


def small_transformer(family: str, seed: int = 0, blocks: int = 4) -> ModelMixin:
    """A filled transformer in evaluation mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer = _BUILD[family](blocks)
    small_pipelines.fill(transformer, std=0.3, seed=seed)
    return transformer.eval()


def family_pass(family: str, time: float, batch: int = 2, seed: int = 0, larger: bool = False) -> dict[str, Any]:
    """Arguments of one pass at a time in [0, 1]; `larger` for more tokens. The seed makes latents, not the prompt."""
    latents, prompt = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)

    def text(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=prompt)

    def sample(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=latents)

    frames, side = 3, 3 if larger else 2
    given = {
        "encoder_hidden_states": text(TEXT_TOKENS, TEXT_DIM),
        "timestep": torch.full((batch,), time * TIMESTEP_SCALE[family]),
        "return_dict": False,
    }
    grid = {"num_frames": frames, "height": side, "width": 2}
    if family == "flux2":
        ids = torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, 4, side + 1, 1)))
        return given | {
            "hidden_states": sample(len(ids), 16), "img_ids": ids, "txt_ids": torch.zeros(TEXT_TOKENS, 4),
        }  # fmt: skip
    if family == "wan":
        return given | {"hidden_states": sample(4, frames, 2 * side, 4)}
    if family == "ltx":
        mask = torch.ones(batch, TEXT_TOKENS)
        return given | grid | {"hidden_states": sample(frames * side * 2, 8), "encoder_attention_mask": mask}
    if family == "sd3":
        return given | {"hidden_states": sample(4, 2 * side, 6), "pooled_projections": text(20)}
    return given | grid | {
        "hidden_states": sample(frames * side * 2, 8),
        "audio_hidden_states": sample(7, 4),
        "audio_encoder_hidden_states": text(TEXT_TOKENS, TEXT_DIM),
        "audio_num_frames": 7,
    }  # fmt: skip


class _Connectors(nn.Module):
    """In the place of LTX-2's text connectors: both streams get the prompt as it is."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, prompt: Tensor, mask: Tensor, padding_side: str) -> tuple[Tensor, Tensor, Tensor]:
        return prompt, prompt, mask


class _Latents(nn.Module):
    """In the place of a decoder: what the LTX pipelines read off it even when only latents are asked for."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, channels: int, **known: object) -> None:
        super().__init__()
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        self.config = SimpleNamespace(scaling_factor=1.0, **known)
        for name, value in known.items():
            setattr(self, name, value)


def family_pipeline(family: str, seed: int = 0, blocks: int = 4) -> DiffusionPipeline:
    """diffusers' own pipeline of a family (for FLUX.2 our small one) around a small transformer."""
    if family == "flux2":
        config = replace(small_pipelines.SMALL, num_double=blocks - blocks // 2, num_single=blocks // 2)
        return small_pipelines.small_pipeline(config, seed, std=0.3)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": small_transformer(family, seed, blocks)}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    if family == "wan":
        pipe = WanPipeline(**parts)
    elif family == "sd3":
        more = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
        pipe = StableDiffusion3Pipeline(**parts, **more)
    else:
        parts["vae"] = _Latents(8, spatial_compression_ratio=32, temporal_compression_ratio=8)
        audio = {"sample_rate": 16000, "mel_hop_length": 160, "mel_bins": 8, "latent_channels": 2}
        audio |= {"mel_compression_ratio": 4, "temporal_compression_ratio": 4}
        more = {"audio_vae": _Latents(4, **audio), "vocoder": None, "connectors": _Connectors()}
        pipe = LTXPipeline(**parts) if family == "ltx" else LTX2Pipeline(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_sample(
    pipe: DiffusionPipeline, steps: int = 6, guidance: float = 2.0, batch: int = 2, seed: int = 7, **call: object
) -> Tensor:
    """Latents (of FLUX.2 images) of one generation; `call` goes to the pipeline. LTX-2: the video's."""
    if isinstance(pipe, Flux2KleinPipeline):
        return small_pipelines.generate(pipe, steps, guidance, batch, seed)
    prompts = torch.randn(2, batch, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(seed + 1))
    given: dict[str, Any] = {
        "prompt_embeds": prompts[0],
        "negative_prompt_embeds": prompts[1],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
    }
    if isinstance(pipe, StableDiffusion3Pipeline):
        pooled = {"pooled_prompt_embeds": prompts[0, :, 0, :20], "negative_pooled_prompt_embeds": prompts[1, :, 0, :20]}
        return pipe(**given | pooled | {"height": 32, "width": 48} | call)[0]
    if isinstance(pipe, WanPipeline):
        return pipe(**given | {"height": 32, "width": 48, "num_frames": 9} | call)[0]
    mask = torch.ones(batch, TEXT_TOKENS)
    given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    if isinstance(pipe, LTX2Pipeline):  # its other guidances, one more pass each, only where a test asks for them
        given |= {"audio_guidance_scale": guidance, "modality_scale": 1.0, "audio_modality_scale": 1.0}
        given |= {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    return pipe(**given | {"height": 64, "width": 96, "num_frames": 17} | call)[0]
