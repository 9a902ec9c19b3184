"""What a full run did at each pass, kept so that another could be tried without its blocks.

A search over schedules asks thousands of times: had the blocks been skipped here, and the residual predicted from
there, how far off would the velocity be? The blocks need not run for that. `record` keeps of every pass of one batch

    the arguments of the call (with them x_t),   the residual r = z - h of the stack,   the velocity v

and `Replay` answers it with the head and the tail alone:  v' = tail(head(x_t) + r').  It uses the cut of the step cache
(`stack.py`), so what is tried is what the cache will do, in every family of transformers.

What enters the stack is not kept: the head gives it again for a hundredth of a step. A recording holds two tensors of
latent size and the residuals for each pass; record a few prompts at a time, use them, and drop them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun
from diffusion_opt.caching.step.generation import DEFAULT_CONTEXT
from diffusion_opt.caching.step.hooks import arguments_of
from diffusion_opt.caching.step.stack import StackCut, StackPass
from diffusion_opt.models.block_stack import Streams


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """One batch to generate, the same each time: the arguments of the pipeline's call, and the seed of its noise."""

    call: Mapping[str, Any]  # prompt, num_inference_steps, guidance_scale, height, …
    seed: int

    @torch.no_grad()
    def run(self, pipe: DiffusionPipeline) -> Float[Tensor, "b *s"]:
        """The latents that the pipeline makes of it; of a pipeline with sound, the video's."""
        generator = torch.Generator().manual_seed(self.seed)
        return pipe(**self.call, generator=generator, output_type="latent", return_dict=False)[0]


def generation_tasks(
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 10,
    **call: object,
) -> tuple[GenerationTask, ...]:
    """Split prompts into batches, the first with noise of `seed`, the next of `seed + 1`, …

    `call` goes to the pipeline (height, width, num_frames, …). Raises ValueError without prompts.
    """
    if not prompts or batch_size < 1:
        raise ValueError(f"a task needs a prompt or more, got {len(prompts)} prompts in batches of {batch_size}")
    shared = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **call}
    starts = range(0, len(prompts), batch_size)
    return tuple(
        GenerationTask({"prompt": list(prompts[start : start + batch_size]), **shared}, seed + number)
        for number, start in enumerate(starts)
    )


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

    @property
    def num_steps(self) -> int:
        """Passes of a context."""
        return len(next(iter(self.passes.values())))

    @property
    def times(self) -> tuple[float, ...]:
        """Of the passes, with the end, 0, behind them."""
        return (*(one.time for one in next(iter(self.passes.values()))), 0.0)

    def guided(self, velocities: Mapping[str, Float[Tensor, "_ *s"]]) -> Float[Tensor, "b *s"]:
        """The velocity that moves the samples: u + w (c - u) of what each context gave, w the guidance scale.

        Two passes are told by their names, both in one pass by the doubled batch, unconditional first as in diffusers.
        Raises ValueError for passes that are neither.
        """
        scale = self.run.guidance_scale
        if {"cond", "uncond"} == set(velocities):
            return velocities["uncond"] + scale * (velocities["cond"] - velocities["uncond"])
        if len(velocities) > 1:
            raise ValueError(
                f"of two passes a step, one must be named cond and the other uncond, got {', '.join(velocities)}: "
                "name them with cache_context"
            )
        (velocity,) = velocities.values()
        if len(velocity) != 2 * len(self.output):
            return velocity
        uncond, cond = velocity.chunk(2)
        return uncond + scale * (cond - uncond)

    def velocity(self, step: int) -> Float[Tensor, "b *s"]:
        """The guided velocity of a step."""
        return self.guided({name: passes[step].velocity for name, passes in self.passes.items()})


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
    recorder = _Recorder()
    cut = StackCut(pipe.transformer, recorder)
    cut.attach(pipe.transformer)
    listener = pipe.transformer.register_forward_pre_hook(recorder.listen, with_kwargs=True)
    try:
        output = task.run(pipe)
        run = CalibratedRun.of(pipe)
    finally:
        listener.remove()
        cut.detach(pipe.transformer)
    lengths = {name: len(passes) for name, passes in recorder.passes.items()}
    if set(lengths.values()) != {run.num_inference_steps}:
        raise ValueError(f"expected {run.num_inference_steps} passes in each context, one a timestep, got {lengths}")
    return Recording(run, {name: tuple(passes) for name, passes in recorder.passes.items()}, output)


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
        return self.recording.guided(velocities)
