"""Build a small FLUX.2 pipeline from a size, ready to train.

Fresh weights follow DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3.2): modulation and output start at zero, so
each block starts as the identity and the network as the zero function.
"""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn

from diffusion_opt.datasets import FASHION_CLASSES
from diffusion_opt.models.pipeline import ClassEmbedder, PixelShuffleVAE, TinyFlux2Pipeline


@dataclass(frozen=True, slots=True)
class TinyFlux2Config:
    """The size of a small FLUX.2; the rest follows from it."""

    image_size: int  # pixels a side; a multiple of 4
    num_heads: int
    head_dim: int = 64  # four rotary axes of head_dim / 4 each; num_heads x head_dim is the hidden size
    num_double: int = 1  # blocks with separate image and text streams
    num_single: int = 2  # blocks with one fused stream
    text_dim: int = 64  # size of a class token
    channels: int = 1
    class_names: tuple[str, ...] = FASHION_CLASSES

    def __post_init__(self) -> None:
        if self.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4 (one token is a 4x4 patch), got {self.image_size}")
        if self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8 (four rotary axes of even size), got {self.head_dim}")


SIZES = {
    "fashion": TinyFlux2Config(image_size=28, num_heads=4),  # hidden 256, 49 tokens, 4.6 M parameters
    "fashion-micro": TinyFlux2Config(image_size=16, num_heads=4, head_dim=32),  # hidden 128, 16 tokens, 1.2 M
}


def build_pipeline(config: TinyFlux2Config, seed: int = 0) -> TinyFlux2Pipeline:
    """A pipeline with fresh weights, the same for the same seed (the global random state is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # weights start on the CPU; GPU generators are not touched
        transformer = Flux2Transformer2DModel(
            in_channels=16 * config.channels,
            num_layers=config.num_double,
            num_single_layers=config.num_single,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.text_dim,
            timestep_guidance_channels=64,
            axes_dims_rope=(config.head_dim // 4,) * 4,
            guidance_embeds=False,
        )
        embedder = ClassEmbedder(class_names=config.class_names, dim=config.text_dim)
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(parameter)
    return TinyFlux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=PixelShuffleVAE(in_channels=config.channels, sample_size=config.image_size).eval(),
        transformer=transformer.eval(),
        class_embedder=embedder.eval(),
    )
