"""A picture as a starting point: what streaming and editing hand to a FLUX.2 klein pipeline.

Video-to-video and editing start from a given picture x with noise added, x_t = (1 - t) x + t e, at the first time t of
a schedule that begins below 1 (SDEdit, Meng et al. 2021, arXiv 2108.01073). `Flux2KleinPipeline` takes such latents and
a list of `sigmas` for the schedule; what is left to do is to encode the picture as the pipeline does, and to ask its
scheduler at which time it will really start, since a time shift moves the sigmas that it is given.
"""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.flow import interpolate


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Raise ValueError unless this is a pipeline that takes latents and sigmas as FLUX.2 klein does."""
    if not isinstance(pipe, Flux2KleinPipeline):
        raise ValueError(f"a picture as a starting point needs a Flux2KleinPipeline, got {type(pipe).__name__}")


def encode(pipe: DiffusionPipeline, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
    """Clean latents on the token grid of images in [-1, 1]."""
    return pipe._encode_vae_image(image.to(pipe.device, pipe.transformer.dtype), generator=None)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times of a run that begins at a strength: what to pass as `sigmas`, and what the scheduler makes of it."""

    sigmas: tuple[float, ...]
    times: tuple[float, ...]  # one more, down to 0


def schedule(pipe: DiffusionPipeline, steps: int, strength: float, num_tokens: int) -> Schedule:
    """`steps` even steps from `strength` (1: pure noise) to 0, before the pipeline's own time shift.

    Raises ValueError for a strength outside (0, 1] or no steps.
    """
    if steps < 1 or not 0 < strength <= 1:
        raise ValueError(f"need steps >= 1 and a strength above 0 and up to 1, got {steps} and {strength}")
    sigmas = tuple(strength * (1 - i / steps) for i in range(steps))
    pipe.scheduler.set_timesteps(sigmas=list(sigmas), mu=compute_empirical_mu(num_tokens, steps))
    return Schedule(sigmas, tuple(float(s) for s in pipe.scheduler.sigmas))


def noised(clean: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"], time: float) -> Float[Tensor, "b *s"]:
    """Latents at a time on the straight path between picture and noise."""
    return interpolate(clean, noise, torch.full((len(clean),), time, dtype=clean.dtype, device=clean.device))
