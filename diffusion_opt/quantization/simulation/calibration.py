"""What a quantizer is calibrated on: the model's own denoising trajectories, of the run that the user will ask for.

Ranges of activations depend on the time t, on the condition and on the size, so a few random tensors will not do. The
pipeline itself is run as a `Run` says: every class or prompt in turn, different noise in every batch, all steps from
noise to data, both guidance branches. The times are stratified. Where a run names a number of steps n, batch i takes
n + (i mod 4) of them, so that batches step where others do not, and a few short trajectories see what one of many steps
sees:

    batch 0   1 - k / n,      batch 1   1 - k / (n + 1),      …          k = 0, 1, 2, …

A few-step student has only its own times, and stands outside them nowhere: a run without a number of steps takes those
that the pipeline was made for in every batch.
"""

import contextlib
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Num
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.subjects import Run

STRATA = 4  # how many numbers of steps the batches take in turn
LARGEST_BATCH = 10  # of a class-conditional pipeline, which needs no run


def run_or_classes(pipe: DiffusionPipeline, run: Run | None, num_samples: int) -> Run:
    """The run that was given, checked against the pipeline's call, or one of all classes of the pipeline.

    Raises ValueError for a pipeline without classes and no run, for arguments that its call does not take, and for
    those it lacks.
    """
    if run is None:
        return Run.for_pipeline(pipe, batch_size=min(num_samples, LARGEST_BATCH))
    run.check(pipe)
    return run


def run_trajectories(pipe: DiffusionPipeline, run: Run, num_samples: int, progress: bool = False) -> None:
    """Generate `num_samples` samples in batches of `run.batch_size`, taking prompts in turn.

    All noise is drawn from one generator of the run's seed, batch after batch. One bar counts batches; the pipeline's
    own are off.
    """
    generator = torch.Generator().manual_seed(run.seed)
    batches = list(run.batches(num_samples))
    with quiet(pipe):
        for number, indices in enumerate(tqdm(batches, desc="calibrating", unit="batch", disable=not progress)):
            steps = {}
            if run.num_inference_steps is not None:
                steps["num_inference_steps"] = run.num_inference_steps + number % STRATA
            call = run.call(indices, output_type="latent", **steps)
            pipe(**call | {"generator": generator})


@contextlib.contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """The pipeline's own progress bars are off inside."""
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**shown)


def samples_timesteps(timestep: Num[Tensor, "*s"]) -> Num[Tensor, " b"]:
    """The timestep of each sample of a pass, as the transformer is told it; of times for each token the noisiest."""
    return timestep.reshape(len(timestep), -1).amax(1) if timestep.ndim else timestep.reshape(1)


def timestep_scale(pipe: DiffusionPipeline, largest: float) -> int:
    """What the transformer is told at time 1, if `largest` is the largest timestep of a run: 1, or the scheduler's."""
    return 1 if largest <= 1 else int(pipe.scheduler.config.num_train_timesteps)
