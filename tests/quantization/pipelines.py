"""Small pipelines whose output is not zero, and one way to sample from them."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, build_pipeline


def small_pipeline(seed: int = 0) -> TinyFlux2Pipeline:
    """Hidden size 32, fresh weights; those that start at zero are filled, or the output would be zero."""
    config = TinyFlux2Config(16, num_heads=2, head_dim=16, num_double=1, num_single=2, text_dim=24)
    pipe = build_pipeline(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2, generator=generator)
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


def error(images: Tensor, exact: Tensor) -> float:
    """Relative L2 distance, mean over samples."""
    return float(((images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())


def anatomy(transformer: torch.nn.Module) -> dict[str, tuple[int, type, tuple[str, ...]]]:
    """Identity, class and attributes of each module, to tell whether anything was left behind."""
    return {
        name: (id(module), type(module), tuple(sorted({*vars(module), *module._modules} - {"_diffusers_hook"})))
        for name, module in transformer.named_modules()
    }
