"""A small transformer of each family that the region cache knows, and the arguments of one call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)
from small_pipelines import fill
from torch import Tensor, nn

from diffusion_opt.models import position_ids

GRID = (2, 3, 4)  # frames, rows, columns of the video models
NUM_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A family: how to build a transformer, and the arguments of a call with its tokens in `hidden_states`."""

    build: Callable[[], nn.Module]
    call: Callable[[float], dict[str, Any]]

    def made(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.build().eval()
        fill(module, std=0.3)
        return module


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux2() -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def flux2_call(time: float = 0.7) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, NUM_TOKENS, 8),
        "encoder_hidden_states": noise(2, 3, 12, seed=1),
        "timestep": torch.full((2,), time),
        "img_ids": position_ids(4, 6, torch.device("cpu")),
        "txt_ids": torch.zeros(3, 4),
        "return_dict": False,
    }


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_call(time: float = 0.7) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 2, 6, 8),
        "timestep": torch.full((2,), 1000 * time),
        "encoder_hidden_states": noise(2, 3, 12, seed=1),
        "return_dict": False,
    }


def ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=12,
    )


def ltx_call(time: float = 0.7) -> dict[str, Any]:
    frames, height, width = GRID
    return {
        "hidden_states": noise(2, NUM_TOKENS, 8),
        "encoder_hidden_states": noise(2, 3, 12, seed=1),
        "timestep": torch.full((2,), 1000 * time),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def ltx2() -> nn.Module:
    return LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=6,
        audio_cross_attention_dim=12,
        num_layers=2,
        caption_channels=12,
    )


def ltx2_call(time: float = 0.7) -> dict[str, Any]:
    frames, height, width = GRID
    return {
        "hidden_states": noise(2, NUM_TOKENS, 8),
        "audio_hidden_states": noise(2, 5, 6, seed=2),
        "encoder_hidden_states": noise(2, 3, 12, seed=1),
        "audio_encoder_hidden_states": noise(2, 3, 12, seed=3),
        "timestep": torch.full((2,), 1000 * time),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 5,
        "return_dict": False,
    }


CASES = {
    "flux2": Case(flux2, flux2_call),
    "wan": Case(wan, wan_call),
    "ltx": Case(ltx, ltx_call),
    "ltx2": Case(ltx2, ltx2_call),
}
