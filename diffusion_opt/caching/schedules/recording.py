"""What a full run did at each pass, kept so that another could be tried without its blocks.

A search over schedules asks thousands of times: had the blocks been skipped here, and the residual predicted from
there, how far off would the velocity be? The blocks need not run for that. `record` keeps of every pass of one batch

    the arguments of the call (with them x_t),   the residual r = z - h of the stack,   the velocity v

and `Replay` answers it with the head and the tail alone:  v' = tail(head(x_t) + r').  It uses the cut of the step cache
(`stack.py`), so what is tried is what the cache will do, in every family of transformers.

What enters the stack is not kept: the head gives it again for a hundredth of a step. A recording holds two tensors of
latent size and the residuals for each pass; record a few prompts at a time, use them, and drop them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun, watched
from diffusion_opt.caching.schedules.combination import Weights, combined, halves, heard, weights_of
from diffusion_opt.caching.step.generation import DEFAULT_CONTEXT
from diffusion_opt.caching.step.hooks import arguments_of
from diffusion_opt.caching.step.stack import StackCut, StackPass
from diffusion_opt.caching.step.technique import check_one_transformer
from diffusion_opt.models.block_stack import Streams
from diffusion_opt.subjects import Run


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """Some samples of a run, the same each time, in batches of its size; what is recorded must be one batch."""

    wanted: Run
    samples: tuple[int, ...]

    @torch.no_grad()
    def run(self, pipe: DiffusionPipeline) -> Float[Tensor, "b *s"]:
        """The latents that the pipeline makes of it; of a pipeline with sound, the video's."""
        size = self.wanted.batch_size
        batches = [self.samples[start : start + size] for start in range(0, len(self.samples), size)]
        return torch.cat([self.wanted.generate(pipe, batch) for batch in batches])


def generation_tasks(run: Run, num_samples: int | None = None, first: int = 0) -> tuple[GenerationTask, ...]:
    """Batches of samples from `first` on; None: one of each prompt. Raises ValueError for fewer than one."""
    number = len(run.prompts) if num_samples is None else num_samples
    if number < 1:
        raise ValueError(f"a task needs a sample or more, got num_samples={number}")
    return tuple(GenerationTask(run, tuple(first + index for index in batch)) for batch in run.batches(number))


def relative_error(output: Float[Tensor, "b *s"], reference: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    """|output - reference| / |reference| of each sample, in the L2 norm."""
    output, reference = output.float().flatten(1), reference.float().flatten(1)
    return (output - reference).norm(dim=1) / reference.norm(dim=1)


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """One pass in which the blocks ran."""

    time: float  # in [0, 1]
    call: dict[str, Any]  # the transformer's arguments by name
    residual: Streams
    velocity: Float[Tensor, "b *s"]  # what the transformer returned


@dataclass(frozen=True, slots=True)
class Recording:
    """A full run of one batch, pass by pass."""

    run: CalibratedRun
    passes: dict[str, tuple[RecordedPass, ...]]  # of each context, in order of falling time
    output: Float[Tensor, "b *s"]  # the final latents
    weights: tuple[Weights, ...]  # of what the passes of each step gave, in the velocity that moves the samples

    @property
    def num_steps(self) -> int:
        """Passes of a context."""
        return len(next(iter(self.passes.values())))

    @property
    def times(self) -> tuple[float, ...]:
        """Of the passes, with the end, 0, behind them."""
        return (*(one.time for one in next(iter(self.passes.values()))), 0.0)

    def guided(self, step: int, velocities: Mapping[str, Float[Tensor, "_ *s"]]) -> Float[Tensor, "b *s"]:
        """The velocity that moves the samples, of what each context gave in a step (`combination.py`)."""
        return combined(self.weights[step], halves(velocities, len(self.output)))

    def velocity(self, step: int) -> Float[Tensor, "b *s"]:
        """The guided velocity of a step."""
        return self.guided(step, {name: passes[step].velocity for name, passes in self.passes.items()})


class _Recorder:
    """A controller that skips nothing and keeps each pass; the arguments come by a hook on the transformer."""

    probe_blocks = 0

    def __init__(self) -> None:
        self.passes: dict[str, list[RecordedPass]] = {}
        self.call: dict[str, Any] = {}
        self._residual: Streams = {}

    def listen(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = arguments_of(module, args, kwargs)
        self.call = {name: value for name, value in call.items() if value is not module}

    def begin(self, stack: StackPass) -> None:
        return None

    def computed(self, stack: StackPass, residual: Streams) -> None:
        self._residual = residual

    def finished(self, stack: StackPass, output: Tensor) -> None:
        passes = self.passes.setdefault(stack.context or DEFAULT_CONTEXT, [])
        passes.append(RecordedPass(stack.time, self.call, self._residual, output))

    def end_generation(self) -> None:
        """The passes are kept for who asked for them."""


def record(pipe: DiffusionPipeline, task: GenerationTask) -> Recording:
    """Generate once and keep every pass. The pipeline is left as it was.

    Raises ValueError if the transformer cannot be cut, has a cache on it, or did not run once a step in each context.
    """
    check_one_transformer(pipe)
    recorder = _Recorder()
    cut = StackCut(pipe.transformer, recorder, pipe)
    cut.attach(pipe.transformer)
    listener = pipe.transformer.register_forward_pre_hook(recorder.listen, with_kwargs=True)
    try:
        with watched(pipe) as watch, heard(pipe.scheduler) as moving:
            output = task.run(pipe)
            run = watch.run()
    finally:
        listener.remove()
        cut.detach(pipe.transformer)
    passes = {name: tuple(found) for name, found in recorder.passes.items()}
    lengths = {name: len(found) for name, found in passes.items()}
    if set(lengths.values()) != {run.num_passes}:
        raise ValueError(f"expected {run.num_passes} passes in each context, one a step, got {lengths}")
    weights = tuple(
        weights_of(halves({name: found[step].velocity for name, found in passes.items()}, len(output)), velocity)
        for step, velocity in enumerate(moving if len(moving) == run.num_passes else [None] * run.num_passes)
    )
    return Recording(run, passes, output, weights)


class Replay:
    """Runs recorded passes again with other residuals: head and tail of the transformer, and no block.

    A context manager: the cut is on the transformer inside it only.
    """

    probe_blocks = 0

    def __init__(self, transformer: nn.Module, recording: Recording) -> None:
        self.transformer = transformer
        self.recording = recording
        self._residual: Streams = {}

    def __enter__(self) -> "Replay":
        self._cut = StackCut(self.transformer, self)
        self._cut.attach(self.transformer)
        return self

    def __exit__(self, *_: object) -> None:
        self._cut.detach(self.transformer)

    def begin(self, stack: StackPass) -> Streams:
        return self._residual

    def computed(self, stack: StackPass, residual: Streams) -> None:
        raise AssertionError("a replay never runs the blocks")

    def finished(self, stack: StackPass, output: Tensor) -> None:
        """The caller gets the output."""

    def end_generation(self) -> None:
        """Nothing is kept from pass to pass."""

    @torch.no_grad()
    def velocity(self, step: int, residuals: Mapping[str, Streams]) -> Float[Tensor, "samples *s"]:
        """The guided velocity of a step, had the stack of each context given these residuals."""
        velocities = {}
        for name, passes in self.recording.passes.items():
            self._residual = residuals[name]
            output = self.transformer(**passes[step].call)
            velocities[name] = self._cut.family.result(output)
        return self.recording.guided(step, velocities)
