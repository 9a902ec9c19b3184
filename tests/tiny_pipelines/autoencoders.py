"""Autoencoders of the real classes with a few channels and random weights.

Each keeps the factor by which its family shrinks a picture or a clip, because the pipelines compute sizes from it.
"""

import diffusers
from torch import nn


def _ends(levels: int, down: str, up: str) -> dict[str, tuple[str, ...]]:
    return {"down_block_types": (down,) * levels, "up_block_types": (up,) * levels}


def kl(channels: int = 4, scaling_factor: float = 1.5, shift_factor: float | None = 0.06) -> nn.Module:
    """Of SD3, FLUX.1, Z-Image, PixArt and SDXL; here it shrinks by 2."""
    return diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(4, 4), layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling_factor, shift_factor=shift_factor,
        **_ends(2, "DownEncoderBlock2D", "UpDecoderBlock2D"),
    ).eval()  # fmt: skip


def flux2() -> nn.Module:
    return diffusers.AutoencoderKLFlux2(
        sample_size=32, block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        **_ends(2, "DownEncoderBlock2D", "UpDecoderBlock2D"),
    ).eval()  # fmt: skip


def qwen_image() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def sana() -> nn.Module:
    return diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.41,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).eval()  # fmt: skip


def wan() -> nn.Module:
    """Shrinks by 8 in space and 4 in time."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan22() -> nn.Module:
    """Of Wan 2.2 5B: 48 channels, shrinks by 16 in space and 4 in time."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=48, in_channels=12, out_channels=12, is_residual=True, patch_size=2, dim_mult=[1, 1, 1, 1],
        num_res_blocks=1, temperal_downsample=[False, True, True], scale_factor_spatial=16, scale_factor_temporal=4,
        latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    ).eval()  # fmt: skip


def ltx() -> nn.Module:
    """Shrinks by 4 in space and time."""
    scaling, four, five = (True, True, False, False), (False,) * 4, (False,) * 5
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=scaling, decoder_spatio_temporal_scaling=scaling,
        decoder_inject_noise=five, upsample_residual=four, upsample_factor=(1,) * 4, timestep_conditioning=False,
        patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip


def ltx2_video() -> nn.Module:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), timestep_conditioning=False, patch_size=4, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    ).eval()  # fmt: skip


def ltx2_audio() -> nn.Module:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", mid_block_add_attention=False,
        sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    ).eval()  # fmt: skip


def hunyuan_video() -> nn.Module:
    """Shrinks by 8 in space and 4 in time."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        **_ends(4, "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"),
    ).eval()  # fmt: skip


def hunyuan_video15() -> nn.Module:
    """Shrinks by 4 in space and 2 in time."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    ).eval()  # fmt: skip


def cogvideox() -> nn.Module:
    """Shrinks by 8 in space and 4 in time."""
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        **_ends(4, "CogVideoXDownBlock3D", "CogVideoXUpBlock3D"),
    ).eval()  # fmt: skip
