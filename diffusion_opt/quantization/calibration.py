"""What a quantizer is calibrated on: the model's own denoising trajectories.

Ranges of activations depend on the time t and on the condition, so a few random tensors will not do. The pipeline
itself is run: every class or prompt in turn, different noise in every batch, all steps from noise to data, both
guidance branches.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline


def class_prompts(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The class names of a class-conditional pipeline. Raises ValueError for a pipeline that has none."""
    embedder = getattr(pipe, "class_embedder", None)
    if embedder is None:
        raise ValueError(f"{type(pipe).__name__} has no classes to calibrate on: give prompts=(...)")
    return tuple(embedder.config.class_names)


def run_trajectories(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    num_batches: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    seed: int,
) -> None:
    """Generate `num_batches` batches, taking prompts in turn; the same ones for the same seed. No progress bars.

    `guidance_scale` None leaves the choice to the pipeline.
    """
    generator = torch.Generator().manual_seed(seed)
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        for batch in range(num_batches):
            first = batch * batch_size
            pipe(
                prompt=[prompts[index % len(prompts)] for index in range(first, first + batch_size)],
                num_inference_steps=num_inference_steps,
                generator=generator,
                output_type="latent",
                **guidance,
            )
    finally:
        pipe.set_progress_bar_config(**shown)
