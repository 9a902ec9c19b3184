"""A picture as a starting point: what streaming and editing hand to a FLUX.2 pipeline.

Video-to-video and editing start from a given picture x with noise added, x_t = (1 - t) x + t e, at the first time t of
a schedule that begins below 1 (SDEdit, Meng et al. 2021, arXiv 2108.01073). FLUX.2's pipelines, [klein] and [dev], take
such latents and a list of `sigmas` for the schedule; what is left to do is to encode the picture as the pipeline does,
and to ask its scheduler at which time it will really start, since a time shift moves the sigmas that it is given. The
inpainting pipeline takes neither; its parts make a klein pipeline that does.

How far a VAE spreads a change is measured here too: one square of a frame is turned into its negative, and the tokens
far from it should not care.
"""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, Flux2KleinInpaintPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.caching.region.detect import change_scores, dilate
from diffusion_opt.caching.region.families import grid_positions
from diffusion_opt.flow import interpolate

SPREAD_MARGIN = 2.0  # times the largest response of a far token: squares of another place and size spread other amounts


def from_pictures(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, or one of its parts, that takes latents and sigmas. Raises ValueError if FLUX.2 has none such."""
    if isinstance(pipe, Flux2KleinPipeline | Flux2Pipeline):
        return pipe
    if isinstance(pipe, Flux2KleinInpaintPipeline):
        around = Flux2KleinPipeline(**pipe.components, is_distilled=pipe.config.is_distilled)
        around.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return around
    raise ValueError(f"a picture as a starting point needs a pipeline of FLUX.2, got {type(pipe).__name__}")


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


@torch.no_grad()
def vae_spread(pipe: DiffusionPipeline, frame: Float[Tensor, "b c h w"], noise: Tensor, time: float) -> float:
    """How much the input of tokens changes, relative to their mean size, whose own pixels and neighbors did not.

    `noise` is what the frame is noised with, at a time in [0, 1]. 0 for a VAE that is local.
    """
    height, width = frame.shape[2:]
    top, left, side = height // 4, width // 4, max(min(height, width) // 4, 1)
    changed = frame.clone()
    square = changed[:, :, top : top + side, left : left + side]
    square.copy_(torch.where(square >= 0, -1.0, 1.0))
    tokens = [noised(encode(pipe, one), noise, time).flatten(2).mT for one in (frame, changed)]
    rows, columns = noise.shape[-2:]
    mask = (changed != frame).any(dim=(0, 1))
    near = F.adaptive_max_pool2d(mask[None, None].float(), (rows, columns)).flatten().bool().to(noise.device)
    far = ~dilate(near, grid_positions(1, rows, columns, noise.device), max(rows, columns) // 4)
    scores = change_scores(tokens[1], tokens[0])
    return SPREAD_MARGIN * float(scores[far].max()) if bool(far.any()) else 0.0
