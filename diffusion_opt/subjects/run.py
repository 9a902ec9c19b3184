"""What the user says of a generation, said once: prompts, steps, guidance, sizes, and any argument of the call.

Calibration, search, quantization, comparison and measurement all generate with the user's pipeline, and each must do so
as the user will: a calibration at 1,024 x 1,024 says nothing about 480 x 832 x 81 frames. A `Run` is that description,
taken alike by all of them:

    run = Run(("a cat", "a dog"), num_inference_steps=28, guidance_scale=4.0, height=1024, width=1024)
    run = Run(("a cat",), num_frames=81, arguments={"image": picture, "max_sequence_length": 256})

Names are those of the diffusers calls. What stays None is left to the pipeline. Sample i has the prompt i mod n and the
noise of generator `seed + i`, whatever the batches, so the same sample comes out of every batch size.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from diffusion_opt.models.ladder import repeats_seeds

_OWN = ("prompts", "batch_size", "seed", "arguments")  # what a pipeline's call does not take by this name
_SET_HERE = ("prompt", "generator", "output_type", "return_dict", "latents", "callback_on_step_end")


@dataclass(frozen=True, slots=True)
class Run:
    """Prompts and settings of generations.

    Raises ValueError for no prompts, sizes or counts below 1, and `arguments` that have a field of their own.
    """

    prompts: Sequence[str]
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_frames: int | None = None
    negative_prompt: str | None = None
    batch_size: int = 1  # prompts in one call of the pipeline
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the call: image=, strength=, …

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        if not prompts:
            raise ValueError("a run needs at least one prompt, got none")
        object.__setattr__(self, "prompts", prompts)
        object.__setattr__(self, "arguments", dict(self.arguments))
        for name in ("num_inference_steps", "height", "width", "num_frames", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        own = {item.name for item in fields(self)}
        for name in self.arguments:
            if name in own or name in _SET_HERE:
                remedy = f"give it as Run({name}=…)" if name in own else "a Run sets it itself"
                raise ValueError(f"arguments must not hold {name!r}: {remedy}")

    @classmethod
    def for_pipeline(cls, pipe: DiffusionPipeline, prompts: Sequence[str] = (), **settings: Any) -> Self:
        """A run of this pipeline, checked against its call; class-conditional pipelines have prompts of their own.

        Raises ValueError if no prompts are given where the pipeline names no classes, and as `check` does.
        """
        embedder = getattr(pipe, "class_embedder", None)
        if not prompts and embedder is not None:
            prompts = tuple(embedder.config.class_names)
        if not prompts:
            raise ValueError(f"{type(pipe).__name__} has no classes of its own to ask for: give prompts")
        run = cls(prompts, **settings)
        run.check(pipe)
        return run

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that do not change from sample to sample, without those left to it."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _OWN}
        return {name: value for name, value in named.items() if value is not None} | dict(self.arguments)

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError if the pipeline's call has no argument of a name that the run sets, or wants one more, and
        if its scheduler adds noise that no seed repeats.
        """
        if not repeats_seeds(pipe):
            raise ValueError(
                f"{type(pipe.scheduler).__name__} adds noise at each step, and {type(pipe).__name__} does not hand it "
                "the generator of the call, so no seed repeats a sample: use models.student_scheduler.StudentScheduler"
                "(ladders, renoise=True), or a scheduler without noise"
            )
        taken = inspect.signature(type(pipe).__call__).parameters
        known, open_ended = set(taken), True
        for owner in type(pipe).__mro__:  # a call that hands on what it does not know takes what its parent takes
            own = inspect.signature(owner.__call__).parameters
            known |= set(own)
            open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
            if not open_ended:
                break
        for name in self.settings:
            if name not in known and not open_ended:
                raise ValueError(f"{type(pipe).__name__} takes no {name!r}: leave it out of the run")
        required = [
            name
            for name, parameter in list(taken.items())[1:]
            if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD,)
        ]
        if missing := [name for name in required if name not in self.settings and name != "prompt"]:
            raise ValueError(
                f"{type(pipe).__name__} cannot be called without {', '.join(missing)}: "
                f"give it in the run, Run(…, arguments={{{missing[0]!r}: …}})"
            )

    def call(self, indices: Sequence[int], **overrides: Any) -> dict[str, Any]:
        """The arguments of the call that makes the samples of these indices: prompts, generators and settings.

        `overrides` take the place of settings (num_inference_steps=…, output_type=…).
        """
        prompts = [self.prompts[index % len(self.prompts)] for index in indices]
        generators = [torch.Generator().manual_seed(self.seed + index) for index in indices]
        settings = self.settings | overrides
        if isinstance(settings.get("negative_prompt"), str):
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
        if len(prompts) == 1:  # several pipelines take a picture beside one prompt only as plain values
            single = {"prompt": prompts[0], "generator": generators[0]}
            if isinstance(settings.get("negative_prompt"), list):
                single["negative_prompt"] = settings["negative_prompt"][0]
            return settings | single
        return settings | {"prompt": prompts, "generator": generators}

    def batches(self, num_samples: int) -> Iterator[range]:
        """The indices of `num_samples` samples, `batch_size` at a time."""
        for start in range(0, num_samples, self.batch_size):
            yield range(start, min(start + self.batch_size, num_samples))

    def generate(
        self, pipe: DiffusionPipeline, indices: Sequence[int], *, output_type: str = "latent", **overrides: Any
    ) -> Any:
        """Call the pipeline for these samples; what it makes first (of LTX-2's video and audio, the video)."""
        return pipe(**self.call(indices, output_type=output_type, return_dict=False, **overrides))[0]

    def fingerprint(self) -> str:
        """16 hex digits of everything that decides over the samples; batches do not."""
        stated = {name: getattr(self, name) for name in ("seed", "prompts")} | {"settings": _stated(self.settings)}
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for reports."""
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items() if isinstance(value, int | float))
        return f"{len(self.prompts)} prompts" + (f", {said}" if said else "")


def _stated(value: Any) -> Any:
    """A value as JSON; pictures and tensors by a digest of their bytes. Raises ValueError for anything else."""
    if isinstance(value, Mapping):
        return {name: _stated(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stated(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return ["tensor", str(data.dtype), list(data.shape), digest]
    if hasattr(value, "tobytes"):  # PIL pictures, numpy arrays
        shape = list(getattr(value, "size", ()) if hasattr(value, "mode") else value.shape)
        return ["picture", getattr(value, "mode", ""), shape, hashlib.sha256(value.tobytes()).hexdigest()]
    raise ValueError(
        f"a run cannot say what {type(value).__name__} is in a file: give numbers, text, pictures or tensors"
    )
