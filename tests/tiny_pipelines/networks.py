"""The transformers of the tiny pipelines: stock diffusers classes, 4 blocks, 2 heads of 32.

A width of 64 and heads of 32 satisfy every technique that wants multiples of 16 or 32. `lively` sees to it that no
output is zero and that the time matters: fresh adaptive layer norms are zero, which would make every step the same.
"""

import diffusers
import torch
from torch import nn

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
SIZE = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}


def lively(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Give weights that are zero or not even set random values, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("pad_token") or not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=std, generator=generator)
            elif parameter.ndim > 1 and ("time_" in name or "timestep" in name):
                parameter.mul_(1.5)
    return module.eval()


def flux2(guidance: bool = False) -> nn.Module:
    """For a text encoder of width 16, of which three layers are read."""
    return lively(diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=48,
        timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=guidance, **SIZE,
    ))  # fmt: skip


def flux(guidance: bool = True) -> nn.Module:
    return lively(diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), guidance_embeds=guidance, **SIZE,
    ))  # fmt: skip


def sd3(channels: int = 4, dual_layers: tuple[int, ...] = ()) -> nn.Module:
    return lively(diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=channels, out_channels=channels, num_layers=4,
        caption_projection_dim=WIDTH, joint_attention_dim=32, pooled_projection_dim=64, pos_embed_max_size=32,
        qk_norm="rms_norm", dual_attention_layers=dual_layers, **SIZE,
    ))  # fmt: skip


def qwen_image(**more: object) -> nn.Module:
    return lively(diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 12, 12), **SIZE, **more,
    ))  # fmt: skip


def z_image() -> nn.Module:
    return lively(diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=WIDTH, n_layers=4, n_refiner_layers=1,
        n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=16, axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    ))  # fmt: skip


def pixart() -> nn.Module:
    return lively(diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=4, patch_size=2, in_channels=4, out_channels=8, caption_channels=32,
        cross_attention_dim=WIDTH, **SIZE,
    ))  # fmt: skip


def sana() -> nn.Module:
    return lively(diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=4, num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM, cross_attention_dim=WIDTH, caption_channels=16, sample_size=16, **SIZE,
    ))  # fmt: skip


def _wan(kind: type[nn.Module], in_channels: int, out_channels: int, **more: object) -> nn.Module:
    return lively(kind(
        patch_size=(1, 2, 2), in_channels=in_channels, out_channels=out_channels, text_dim=32, freq_dim=32,
        ffn_dim=2 * WIDTH, num_layers=4, rope_max_seq_len=64, **SIZE, **more,
    ))  # fmt: skip


def wan(in_channels: int = 16, out_channels: int = 16, image_dim: int | None = None) -> nn.Module:
    return _wan(diffusers.WanTransformer3DModel, in_channels, out_channels, image_dim=image_dim)


def wan_vace() -> nn.Module:
    return _wan(diffusers.WanVACETransformer3DModel, 16, 16, vace_layers=[0, 2], vace_in_channels=96)


def ltx() -> nn.Module:
    return lively(diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=WIDTH, num_layers=4, caption_channels=32, **SIZE
    ))  # fmt: skip


def ltx2() -> nn.Module:
    return lively(diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=WIDTH, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=HEADS, audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=4,
        caption_channels=32, rope_double_precision=False, rope_type="split", **SIZE,
    ))  # fmt: skip


def hunyuan_video(**more: object) -> nn.Module:
    return lively(diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=1,
        patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(8, 12, 12),
        **SIZE, **more,
    ))  # fmt: skip


def hunyuan_video15() -> nn.Module:
    return lively(diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_layers=4, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1,
        patch_size_t=1, text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=12, rope_axes_dim=(8, 12, 12),
        target_size=16, task_type="t2v", **SIZE,
    ))  # fmt: skip


def cogvideox() -> nn.Module:
    return lively(diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32, num_layers=4, sample_width=4,
        sample_height=4, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=32, **SIZE,
    ))  # fmt: skip


def sdxl_unet() -> nn.Module:
    return lively(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64, norm_num_groups=4,
    ))  # fmt: skip
