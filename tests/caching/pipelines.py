"""Small pipelines whose output is not zero, and one way to sample from them."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, build_pipeline


def small_pipeline(seed: int = 0, num_double: int = 2, num_single: int = 3) -> TinyFlux2Pipeline:
    """Fresh weights; those that start at zero are filled, or every residual would be zero."""
    config = TinyFlux2Config(16, num_heads=2, head_dim=16, num_double=num_double, num_single=num_single, text_dim=24)
    pipe = build_pipeline(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiffusionPipeline, steps: int = 6, guidance: float = 2.0, batch: int = 3, seed: int = 7) -> Tensor:
    """Images (batch, 1, s, s) of the first classes."""
    return pipe(
        prompt=[str(label) for label in range(batch)],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def inputs_at(time: float, batch: int = 2, image_tokens: int = 16, seed: int = 0) -> dict:
    """Arguments of one transformer pass at a time, two text tokens in front."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, image_tokens, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 2, 24, generator=generator),
        "timestep": torch.full((batch,), time),
        "img_ids": torch.zeros(image_tokens, 4),
        "txt_ids": torch.zeros(2, 4),
        "return_dict": False,
    }
