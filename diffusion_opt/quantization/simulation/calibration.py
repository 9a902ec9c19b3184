"""What a quantizer is calibrated on: the model's own denoising trajectories.

Ranges of activations depend on the time t and on the condition, so a few random tensors will not do. The pipeline
itself is run: every class or prompt in turn, different noise in every batch, all steps from noise to data, both
guidance branches. The times are stratified. Where a number of steps n is given, batch i takes n + i of them, so that
each batch steps where the others do not, and a few short trajectories see what one of many steps sees:

    batch 0   1 - k / n,      batch 1   1 - k / (n + 1),      …          k = 0, 1, 2, …

A few-step student has only its own times, and stands outside them nowhere: with n None every batch runs the steps that
the pipeline was made for.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm


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
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int,
    progress: bool = False,
    **call: object,
) -> None:
    """Generate `num_batches` batches, taking prompts in turn; the same ones for the same seed.

    `num_inference_steps` n gives batch i n + i steps; None, and a `guidance_scale` of None, leave the choice to the
    pipeline. `call` goes to the pipeline (height, num_frames, …). One bar counts batches; the pipeline's own are off.
    """
    generator = torch.Generator().manual_seed(seed)
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        for batch in tqdm(range(num_batches), desc="calibrating", unit="batch", disable=not progress):
            first = batch * batch_size
            steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps + batch}
            pipe(
                prompt=[prompts[index % len(prompts)] for index in range(first, first + batch_size)],
                generator=generator,
                output_type="latent",
                **steps,
                **guidance,
                **call,
            )
    finally:
        pipe.set_progress_bar_config(**shown)
