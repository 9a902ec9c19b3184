"""Small pipelines for tests: fresh weights whose output is not zero, and one way to sample from them."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, build_pipeline

SMALL = TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=24)


def fill(module: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Give weights that start at zero small random values, or the output would be zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std, generator=generator)


def small_pipeline(
    config: TinyFlux2Config = SMALL, seed: int = 0, std: float = 0.2, **settings: object
) -> TinyFlux2Pipeline:
    """A filled pipeline; `settings` go to its configuration (default_steps, is_distilled, …)."""
    pipe = build_pipeline(config, seed=seed)
    fill(pipe.transformer, std, seed)
    pipe.register_to_config(**settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiffusionPipeline, steps: int = 3, guidance: float = 2.0, batch: int = 3, seed: int = 7) -> Tensor:
    """Images (batch, 1, s, s) of the first classes."""
    return pipe(
        prompt=[str(label) for label in range(batch)],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
