"""Deeper small pipelines, sampled over more steps, and the inputs of single passes."""

from dataclasses import replace
from functools import partial

import small_pipelines
import torch
from small_pipelines import SMALL

from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.subjects import Run

generate = partial(small_pipelines.generate, steps=6)


def small_pipeline(seed: int = 0, num_double: int = 2, num_single: int = 3) -> TinyFlux2Pipeline:
    """Filled strongly, so that steps differ enough to tell skipped ones from computed ones."""
    config = replace(SMALL, num_double=num_double, num_single=num_single)
    return small_pipelines.small_pipeline(config, seed, std=0.3)


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


def run_of(*prompts: str, steps: int = 6, guidance: float = 2.0, seed: int = 1, batch_size: int = 10) -> Run:
    """A run of the small pipeline: one of each prompt."""
    return Run(prompts, num_inference_steps=steps, guidance_scale=guidance, seed=seed, batch_size=batch_size)
