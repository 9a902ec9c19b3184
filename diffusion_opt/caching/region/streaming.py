"""Video-to-video, frame after frame: the use for which a region cache is made.

Each frame is noised to the same strength with the *same* noise and denoised under the same prompt, so that whatever did
not move gives the transformer the same input as in the frame before, bit for bit. `stream` does this with the stock
pipeline; with a `StreamingRegionCache` on it only what moved is computed:

    pipe = StreamingRegionCache(ring=1).apply(load("fashion-4step"))
    for image in stream(pipe, frames, "t-shirt", steps=2, strength=0.5): ...

This does not depend on the number of steps: a one-step student has no neighboring step to reuse, but it has the frame
before.
"""

from collections.abc import Iterable, Iterator

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.region.policy import Streaming
from diffusion_opt.caching.region.session import policy_of
from diffusion_opt.caching.region.source import encode, from_pictures, noised, schedule, vae_spread


def stream(
    pipe: DiffusionPipeline,
    frames: Iterable[Float[Tensor, "b c h w"]],
    prompt: str | list[str],
    *,
    steps: int,
    strength: float = 0.5,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Images in [0, 1] for source frames in [-1, 1], one by one; `prompt` is a list with one entry for each of a batch.

    `steps` is the number of network evaluations of a frame, from `strength` down; `guidance_scale` None is the
    pipeline's own. Raises ValueError for a pipeline that is not FLUX.2's, or a strength outside (0, 1].
    """
    pipe = from_pictures(pipe)
    noise = None
    for frame in frames:
        clean = encode(pipe, frame)
        if noise is None or noise.shape != clean.shape:
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
            plan = schedule(pipe, steps, strength, num_tokens=clean[0, 0].numel())
            policy = policy_of(pipe.transformer, Streaming)
            if policy is not None and policy.threshold is None:
                policy.measured = vae_spread(pipe, frame.to(clean), noise, plan.times[0])
        guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        yield pipe(
            prompt=prompt,
            latents=noised(clean, noise, plan.times[0]),
            sigmas=list(plan.sigmas),
            num_inference_steps=steps,
            height=frame.shape[2],
            width=frame.shape[3],
            output_type="pt",
            **guided,
        ).images
