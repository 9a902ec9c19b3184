"""The times a student was trained for: stored with the pipeline, used by every call, and other step counts refused.

A student of few steps is trained at a handful of times, its ladder. Sampled at others it fails quietly: pictures come
out, only worse (trained at [0.999, 0.75, 0.5, 0.25], sampled at linspace(0.999, 0, 5) is the classic case). diffusers'
schedulers have no field for a ladder, so it stands in the pipeline's config, `ladders` in `model_index.json`: one list
of falling times for each step count the student serves, first 1 (noise), the final 0 left out.

    [[1.0], [1.0, 0.5], [1.0, 0.9, 0.75, 0.5]]       a consistency student for 1, 2 and 4 steps
    [[1.0, 0.75, 0.5, 0.25]]                         four jumps along the teacher's path, and nothing else

Between two rungs a student either goes on along the path (Euler) or predicts the picture and noises it again (Song et
al. 2023, arXiv 2303.01469, algorithm 1; diffusers' `FlowMatchLCMScheduler`). The pipelines of diffusers do not hand
their generator to the scheduler, which then draws that noise from the global one; `seeded_steps` hands it over.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, SchedulerMixin


def set_ladders(pipe: DiffusionPipeline, ladders: Sequence[Sequence[float]], renoise: bool) -> None:
    """Make `pipe` a student of these ladders: scheduler, default steps (the longest ladder), one pass a step.

    `renoise`: predict the picture and noise it again at each rung, else follow the path. Raises ValueError for a ladder
    that does not fall from 1 towards 0, for two of the same length, and for none.
    """
    rungs = [[float(t) for t in ladder] for ladder in ladders]
    for ladder in rungs:
        if not ladder or ladder[0] != 1 or ladder[-1] <= 0 or any(t <= r for t, r in pairwise(ladder)):
            raise ValueError(f"a ladder falls from 1.0 and leaves out the final 0, got {ladder}")
    if not rungs or len({len(ladder) for ladder in rungs}) < len(rungs):
        raise ValueError(f"give one ladder for each number of steps, got {rungs}")
    scheduler = FlowMatchLCMScheduler if renoise else FlowMatchEulerDiscreteScheduler
    pipe.scheduler = scheduler(shift=1.0)
    pipe.register_to_config(
        ladders=rungs, default_steps=max(len(ladder) for ladder in rungs), is_distilled=True, default_guidance=1.0
    )


def ladder_of(ladders: Sequence[Sequence[float]], steps: int, sigmas: Sequence[float] | None = None) -> list[float]:
    """The ladder with this number of steps, or `sigmas` of a run that begins below 1, at a noised picture.

    Raises ValueError for a run from noise at times that the student was not trained for. Where a picture is edited the
    caller chooses how much of it stays, and so the times.
    """
    if sigmas is not None and sigmas[0] < 1:
        return list(sigmas)
    if sigmas is not None and list(sigmas) not in [list(ladder) for ladder in ladders]:
        raise ValueError(f"from noise this student's sigmas are those of its ladders, {ladders}; got {list(sigmas)}")
    if sigmas is not None and len(sigmas) != steps:
        raise ValueError(f"the sigmas given are {len(sigmas)} steps, and num_inference_steps={steps}: leave one out")
    for ladder in ladders:
        if len(ladder) == steps:
            return list(ladder)
    known = ", ".join(str(n) for n in sorted(len(ladder) for ladder in ladders))
    raise ValueError(
        f"this student was trained for {known} steps, got num_inference_steps={steps}; other times need other training"
    )


def repeats_seeds(pipe: DiffusionPipeline) -> bool:
    """Whether the noise that the scheduler adds at each step, if any, comes from the generator of the call.

    Pipelines hand it over only where they ask which arguments the scheduler's step takes; ours does so by itself.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return True
    kind, config = type(scheduler).__name__, scheduler.config
    noise = config.get("stochastic_sampling") or "sde" in config.get("algorithm_type", "") or "LCM" in kind
    asks = hasattr(pipe, "prepare_extra_step_kwargs")
    handed = asks and "generator" in inspect.signature(scheduler.step).parameters
    return not noise or handed or getattr(pipe, "class_embedder", None) is not None


@contextmanager
def seeded_steps(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None
) -> Iterator[None]:
    """During this block noise that a re-noising scheduler adds comes from `generator`; others are left alone."""
    adds_noise = isinstance(scheduler, FlowMatchLCMScheduler) or scheduler.config.get("stochastic_sampling", False)
    if generator is None or not adds_noise:
        yield
        return
    step: Any = scheduler.step
    scheduler.step = partial(step, generator=generator)
    try:
        yield
    finally:
        del scheduler.step
