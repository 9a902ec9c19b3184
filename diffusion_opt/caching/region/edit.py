"""A region of a picture made anew, the rest kept: masked editing with a region cache.

The picture is known outside the mask, at every time of the run: x_t = (1 - t) x + t e with the noise e that the region
starts from. After each step those tokens are set to it (RePaint, Lugmayr et al. 2022, arXiv 2201.09865, without its
resampling), so all that the network has to give is the velocity under the mask:

    x_t[outside] <- (1 - t) x + t e

With an `EditRegionCache` on the pipeline the passes between refreshes compute no more than that. The others' keys and
values are then as old as the last refresh: the cache follows the run's *own* trajectory, because those of another run,
with another prompt, are of no use.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.caching.region.policy import Masked
from diffusion_opt.caching.region.session import policy_of
from diffusion_opt.caching.region.source import encode, from_pictures, noised, schedule
from diffusion_opt.caching.region.technique import set_region


def token_mask(mask: Bool[Tensor, "h w"], rows: int, columns: int) -> Bool[Tensor, " n"]:
    """Tokens of a rows x columns grid of which a mask of pixels covers any part."""
    return F.adaptive_max_pool2d(mask[None, None].float(), (rows, columns)).flatten().bool()


def edit(
    pipe: DiffusionPipeline,
    image: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "h w"],
    prompt: str | list[str],
    *,
    steps: int,
    strength: float = 1.0,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Float[Tensor, "b c h w"]:
    """Images in [0, 1]: those given, in [-1, 1], with the tokens under `mask` made anew for the prompt.

    `strength` 1 forgets what was there. Works with and without an `EditRegionCache` on the pipeline. Raises ValueError
    for a pipeline that is not FLUX.2's, an empty mask, or a strength outside (0, 1].
    """
    pipe = from_pictures(pipe)
    if not bool(mask.any()):
        raise ValueError("the mask is empty: mark at least one pixel to make anew")
    clean = encode(pipe, image)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    plan = schedule(pipe, steps, strength, num_tokens=clean[0, 0].numel())
    region = token_mask(mask, *clean.shape[-2:]).to(clean.device)
    packed_clean, packed_noise = pipe._pack_latents(clean), pipe._pack_latents(noise)

    def keep_outside(_: DiffusionPipeline, step: int, __: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        outside = noised(packed_clean, packed_noise, plan.times[step + 1])
        return {"latents": torch.where(region[:, None], state["latents"], outside)}

    cached = policy_of(pipe.transformer, Masked) is not None
    guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if cached:
        set_region(pipe, region)
    try:
        return pipe(
            prompt=prompt,
            latents=noised(clean, noise, plan.times[0]),
            sigmas=list(plan.sigmas),
            num_inference_steps=steps,
            height=image.shape[2],
            width=image.shape[3],
            output_type="pt",
            callback_on_step_end=keep_outside,
            **guided,
        ).images
    finally:
        if cached:
            set_region(pipe, None)
