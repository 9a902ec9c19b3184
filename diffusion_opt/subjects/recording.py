"""What a pipeline asks of its transformer, learned by watching one call of it.

Each family packs latents, encodes text, counts time and numbers positions in its own way, and its pipeline knows how.
So nothing of that is written down here: the user's own call is run and watched, with a scheduler that keeps a tape. Of
the arguments of a pass each is one of four:

    a stream     the sample itself, or a part of it (LTX-2: `hidden_states` is video, `audio_hidden_states` sound)
    the time     halves when the time halves: `timestep`, for LTX-2 also `sigma`; its value at t = 1 is the scale
    the text     what changes with the prompt: tokens, masks, pooled vectors
    the rest     positions, sizes, rates: the same in every pass

Two steps at t = 1 and t = 1/2 tell them apart. They also show that the transformer's output is the velocity that the
scheduler gets, and with which sign. A pipeline where that does not hold is refused with what was seen: one that shows
its transformer more than the sample (a picture beside it), one that predicts something else, one with two networks.
Text of further prompts needs no pass: the call is ended when it reaches the transformer.

The same tape makes a decoder of any pipeline: its scheduler returns the samples that are to be decoded.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from diffusion_opt.models.schedulers import flow_scheduler
from diffusion_opt.models.student_scheduler import StudentScheduler
from diffusion_opt.subjects.networks import denoisers
from diffusion_opt.subjects.run import Run

WITHOUT_GUIDANCE = {  # of every pipeline's call that has such an argument
    "guidance_scale": 1.0, "true_cfg_scale": 1.0, "audio_guidance_scale": 1.0, "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0, "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0,
    "audio_modality_scale": 1.0, "spatio_temporal_guidance_blocks": None, "skip_guidance_layers": None,
    "guidance_scale_2": None,
}  # fmt: skip
PICTURES = ("image", "images", "video", "mask_image", "last_image", "reference_images")  # arguments of calls
TOLERANCE = 2e-2  # relative, between the transformer's output and what the scheduler gets, in half precision too


@dataclass
class Tape:
    """What passed through the transformer and the scheduler during a call; copies of a scheduler share one."""

    passes: list[tuple[dict[str, Any], Any]] = field(default_factory=list)  # arguments and output
    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # velocity and sample
    returned: list[Tensor] = field(default_factory=list)  # what steps return instead of moving on, in their order

    def __deepcopy__(self, memo: dict) -> "Tape":
        return self


class _Watching(FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """Euler's method at evenly spaced times, on a tape."""

    tape: Tape

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None,
                      mu: float | None = None, timesteps: Any = None) -> None:  # fmt: skip
        steps = num_inference_steps or len(sigmas)
        super().set_timesteps(device=device, sigmas=[1 - i / steps for i in range(steps)])

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tape.steps.append((model_output.detach(), sample.detach()))
        moved = super().step(model_output, timestep, sample, *args, **kwargs)
        if not self.tape.returned:
            return moved
        given = self.tape.returned.pop(0).to(sample.dtype)
        if given.shape != sample.shape:
            raise ValueError(f"samples of shape {tuple(given.shape)} cannot be decoded where {tuple(sample.shape)} are")
        return (given,) if isinstance(moved, tuple) else type(moved)(prev_sample=given)


class _Reached(Exception):
    """The call has reached the transformer, and need not go on."""


@dataclass(frozen=True)
class Recording:
    """The arguments of a pass, sorted; tensors have a batch of one."""

    streams: dict[str, Tensor]  # the sample at t = 1, by argument
    times: dict[str, Tensor]  # value at t = 1
    others: dict[str, Any]  # text and the rest
    sign: int  # of the output, as a velocity


def check_kind(pipe: DiffusionPipeline) -> nn.Module:
    """The one transformer. Raises ValueError for a pipeline with two of them, or that does not follow a flow."""
    networks, kind = denoisers(pipe), type(pipe).__name__
    if len(networks) > 1:
        raise ValueError(
            f"{kind} has two networks, one for each range of times; a student of both at once cannot be trained here. "
            "Take a model with one (Wan 2.1, Wan 2.2 5B), or make this one faster with caches and quantization"
        )
    if "strength" in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(
            f"{kind} begins at a noised picture, and a student is trained from noise on: distill the pipeline without "
            "a picture, and give its student's transformer to this one"
        )
    if getattr(pipe, "guider", None) is not None:
        raise ValueError(
            f"{kind} mixes its passes by a guider ({type(pipe.guider).__name__}), not by an argument of its call, so "
            "guidance cannot be switched off and taught: use caches and quantization"
        )
    transformer = next(iter(networks.values()))
    first = next(iter(list(inspect.signature(type(transformer).forward).parameters.values())[1:]))
    if "list" in str(first.annotation):
        raise ValueError(
            f"{type(transformer).__name__} takes a list of samples, each of a size of its own, and losses compute on "
            "batches: use caches and quantization"
        )
    if not isinstance(pipe.scheduler, StudentScheduler):
        flow_scheduler(pipe.scheduler, second_order=False)
    return transformer


def check_pictures(pipe: DiffusionPipeline, run: Run) -> None:
    """Raise ValueError for a call that is given pictures, or needs them: the network sees them beside the sample."""
    taken = inspect.signature(type(pipe).__call__).parameters
    given = [name for name in PICTURES if run.arguments.get(name) is not None]
    needed = [name for name in PICTURES if "ImageToVideo" in type(pipe).__name__ and name in taken]
    if given or needed:
        raise ValueError(
            f"{type(pipe).__name__} shows its transformer a picture ({(given or needed)[0]}) beside the sample, and "
            "students learn from noise and text alone: distill the pipeline without a picture (of the same family, "
            "text to image or text to video), or use caches and quantization here"
        )


@torch.no_grad()
def record(pipe: DiffusionPipeline, run: Run) -> Recording:
    """Watch two steps of a call. Raises ValueError, with what was seen, for a pipeline that cannot be followed."""
    transformer = check_kind(pipe)
    check_pictures(pipe, run)
    with watched(pipe, transformer) as tape:
        pipe(**_arguments(pipe, run, run.prompts[0], steps=2))
    if len(tape.passes) != 2:
        raise ValueError(
            f"{type(pipe).__name__} takes {len(tape.passes) / 2:g} passes per step without guidance, not one"
        )
    (first, output), (second, _) = tape.passes
    samples = tape.steps[: len(tape.steps) // 2]
    streams = _streams(type(pipe).__name__, first, [sample for _, sample in samples])
    outputs = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
    sign = _sign(type(pipe).__name__, outputs, [velocity for velocity, _ in samples])
    times, others = {}, {}
    for name, value in first.items():
        if name in streams:
            continue
        if _same(value, second[name]):
            others[name] = value
        elif isinstance(value, Tensor) and torch.allclose(value.float() / 2, second[name].float(), rtol=1e-3):
            times[name] = value
        else:
            raise ValueError(f"{type(pipe).__name__} changes {name!r} from step to step, in a way that is not the time")
    if not times:
        raise ValueError(f"{type(pipe).__name__} does not tell its transformer the time: nothing halves with it")
    return Recording(streams, times, others, sign)


@torch.no_grad()
def record_text(pipe: DiffusionPipeline, run: Run, prompt: str) -> dict[str, Any]:
    """The arguments of the first pass for another prompt; no pass is computed."""
    with watched(pipe, check_kind(pipe), computes=False) as tape:
        try:
            pipe(**_arguments(pipe, run, prompt, steps=2))
        except _Reached:
            return tape.passes[0][0]
    raise ValueError(f"{type(pipe).__name__} made a picture of {prompt!r} without its transformer")


@torch.no_grad()
def decode(pipe: DiffusionPipeline, run: Run, streams: Sequence[Tensor]) -> Any:
    """What the pipeline makes of samples (1, …), one for each stream: its first output, as tensors."""
    with watched(pipe, check_kind(pipe)) as tape:
        tape.returned.extend(streams)
        arguments = _arguments(pipe, run, run.prompts[0], steps=1)
        return pipe(**{**arguments, "output_type": "pt"})[0]


@contextmanager
def watched(pipe: DiffusionPipeline, transformer: nn.Module, computes: bool = True) -> Iterator[Tape]:
    """During this block calls of the pipeline take even steps, on the tape."""
    tape, scheduler = Tape(), pipe.scheduler
    watching = _Watching(shift=1.0)
    watching.tape = tape

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        tape.passes.append((dict(zip(names, args, strict=False)) | kwargs, None))
        if not computes:
            raise _Reached

    def after(_module: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Any) -> None:
        tape.passes[-1] = (tape.passes[-1][0], output)

    hooks = [
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after, with_kwargs=True),
    ]
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    pipe.scheduler = watching
    try:
        yield tape
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**shown)
        for hook in hooks:
            hook.remove()


def _arguments(pipe: DiffusionPipeline, run: Run, prompt: str, steps: int) -> dict[str, Any]:
    """The user's call of one prompt, with so many steps and no guidance but what is an input of the network."""
    taken = inspect.signature(type(pipe).__call__).parameters
    call = run.call([0], num_inference_steps=steps, output_type="latent")
    neutral = {name: value for name, value in WITHOUT_GUIDANCE.items() if name in taken}
    if embeds_guidance(pipe):
        neutral.pop("guidance_scale", None)
    call |= neutral | {"prompt": prompt, "return_dict": False}
    call.pop("negative_prompt", None)
    return call


def check_guidance(pipe: DiffusionPipeline, run: Run, scale: float) -> None:
    """Raises ValueError if the run asks for guidance beside the two passes mixed by `scale`, which students are taught;
    warns if the pipeline's call has such guidance by default.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    main = ("guidance_scale", "true_cfg_scale", "spatio_temporal_guidance_blocks")  # the last one counts with a scale
    unsaid = {}
    for name, neutral in WITHOUT_GUIDANCE.items():
        if name not in taken or name in main:
            continue
        default = taken[name].default
        value = run.arguments.get(name, default)
        if value in (neutral, None) or (name == "audio_guidance_scale" and value == scale):
            continue
        if name in run.arguments:
            raise ValueError(
                f"a student is taught two passes mixed by one scale; {name}={value} is other guidance: leave it out"
            )
        unsaid[name] = value
    if unsaid:
        said = ", ".join(f"{name}={value}" for name, value in unsaid.items())
        warnings.warn(
            f"{type(pipe).__name__} guides by {said} unless told otherwise; the student is taught two passes mixed by "
            f"{scale:g} alone",
            stacklevel=4,
        )


def embeds_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether the guidance scale is an input of the network, as in FLUX.2 [dev]."""
    return any(bool(network.config.get("guidance_embeds", False)) for network in denoisers(pipe).values())


def _streams(kind: str, arguments: dict[str, Any], samples: list[Tensor]) -> dict[str, Tensor]:
    """The arguments that are the scheduler's samples, in its order."""
    found: dict[str, Tensor] = {}
    for sample in samples:
        for name, value in arguments.items():
            fits = isinstance(value, Tensor) and name not in found and value.shape == sample.shape
            if fits and torch.equal(value.float(), sample.to(value.dtype).float()):
                found[name] = sample
                break
        else:
            seen = {name: tuple(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)}
            raise ValueError(
                f"the transformer of {kind} does not see the sample {tuple(sample.shape)} as it is, its inputs are "
                f"{seen}: pictures beside the sample, or a packing of its own, are not served"
            )
    return found


def _sign(kind: str, outputs: list[Tensor], velocities: list[Tensor]) -> int:
    """1 if the outputs are the velocities, -1 if they are their opposites."""
    if len(outputs) < len(velocities):
        raise ValueError(f"the transformer of {kind} gives {len(outputs)} tensors for {len(velocities)} streams")
    for sign in (1, -1):
        pairs = zip(outputs, velocities, strict=False)
        if all(o.shape == v.shape and (sign * o.float() - v.float()).norm() <= TOLERANCE * v.float().norm()
               for o, v in pairs):  # fmt: skip
            return sign
    raise ValueError(f"what the transformer of {kind} predicts is not what its scheduler gets: no velocity to distill")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other
