"""Any diffusers pipeline with prompts as a subject: a user's FLUX.2, SD3, Wan, LTX or LTX-2.

    pipe = diffusion_opt.load("black-forest-labs/FLUX.2-klein-base-4B", dtype="bfloat16")
    subject = PromptedPipeline(pipe, Run(prompts, guidance_scale=4.0, height=1024, width=1024))
    make_student(StudentPlan(subject.name, "dmd2", 4, lora_rank=64), config, out, subject=subject)

How the pipeline calls its transformer is recorded (`recording.py`), so no family is known here; what cannot be followed
is refused with the reason before anything is made. The run says at which size the student works, and its prompts are
what it is trained on. With `data`, latents as the pipeline's scheduler sees them (`real_samples.py`), methods that
learn from pictures are served too.

The teacher stays in the type it was opened in. A student is an adapter on it, or a network of its own in float32 that
is saved in the teacher's type. It is saved as the teacher's pipeline with a `StudentScheduler`, which knows the times
of training, and with steps, sizes and no guidance as the defaults of its call (`models/call_defaults.py`).
"""

import copy
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.datasets import ImageData
from diffusion_opt.flow import ALL_TIMES, Guided, VelocityModel
from diffusion_opt.models.call_defaults import set_call_defaults
from diffusion_opt.models.fingerprint import identity, scheduler_fingerprint
from diffusion_opt.models.schedulers import flow_scheduler
from diffusion_opt.models.student_scheduler import StudentScheduler
from diffusion_opt.models.zoo import load
from diffusion_opt.subjects.conditions import Classes
from diffusion_opt.subjects.networks import denoisers
from diffusion_opt.subjects.recorded_velocity import RecordedVelocity, Texts
from diffusion_opt.subjects.recording import (
    WITHOUT_GUIDANCE,
    check_guidance,
    check_kind,
    decode,
    embeds_guidance,
    record,
    record_text,
)
from diffusion_opt.subjects.run import Run
from diffusion_opt.subjects.subject import Beginning, Sampling, Takes

SIZES = ("height", "width", "num_frames")
NO_PLACE = (
    "the call of {kind} has no place for {what}, which this method's students take as an input: use ode, consistency, "
    "dmd2 or sid"
)
NO_DATA = "this method learns from pictures, and {name} was given none: give latents, or pictures with captions"
KEEPS_LENGTH = "QwenImage"  # pipelines of this family guide without lengthening, see `flow.Guided`


class PromptedPipeline:
    """A `Subject` around a pipeline and a run: its prompts, sizes, guidance and further arguments.

    `device` is where the transformer works; the other parts encode the prompts there and are sent back. Raises
    ValueError for a pipeline that cannot be followed, one that is offloaded, and a run without a guidance scale where
    the scale is an input of the network.
    """

    needs_start = False
    num_reference = 0

    def __init__(
        self,
        pipe: DiffusionPipeline,
        run: Run,
        name: str | None = None,
        data: ImageData | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        run.check(pipe)
        self.transformer = check_kind(pipe)
        if hasattr(self.transformer, "_hf_hook"):
            raise ValueError("this pipeline is offloaded, and training moves no weights about: open it without offload")
        self.pipe, self.run, self.batch = pipe, run, run.batch_size
        self.name = name or str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        self.embedded = embeds_guidance(pipe)
        self.default_guidance = _guidance(pipe, run)
        check_guidance(pipe, run, self.default_guidance)
        self.transformer.eval().requires_grad_(False)
        self.recording, self.texts = _recorded(pipe, run, device)
        self.network = RecordedVelocity(self.transformer, self.recording, self.texts)
        self.sample_shape = self.network.sample_shape
        self.conditions = Classes(len(run.prompts))
        self.data = None if data is None else self._fitting(data)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def with_data(self, num: int | None = None, classes: tuple[str, ...] = ()) -> "PromptedPipeline":
        """The same subject with the first `num` of its samples of these prompts. Raises ValueError if it has none."""
        if self.data is None:
            raise ValueError(NO_DATA.format(name=self.name))
        other = copy.copy(self)
        other.data = self.data.part(num, classes)
        return other

    def refuses(self, takes: Takes, needs_data: bool) -> str | None:
        if takes in ("two times", "guidance"):
            what = "the length of a jump" if takes == "two times" else "the scale that a student is to have"
            return NO_PLACE.format(kind=type(self.pipe).__name__, what=what)
        return NO_DATA.format(name=self.name) if needs_data and self.data is None else None

    def guided(self, scale: float, interval: tuple[float, float] = ALL_TIMES) -> VelocityModel:
        """Two passes, mixed by the scale; or one, where the scale is an input and the run has set it."""
        if not self.embedded:
            return Guided(self.network, scale, interval, type(self.pipe).__name__.startswith(KEEPS_LENGTH))
        if scale != self.default_guidance or interval != ALL_TIMES:
            raise ValueError(
                f"guidance is an input of {type(self.transformer).__name__}, set to {self.default_guidance:g} by the "
                f"run for all times, got {scale:g} in {interval}: give the scale in the run"
            )
        return self.network

    def identity(self) -> dict[str, str]:
        call = replace(self.run, seed=0, num_inference_steps=None)
        return {
            "name": self.name,
            "model": identity(denoisers(self.pipe)).model,
            "scheduler": scheduler_fingerprint(self.pipe.scheduler),
            "conditions": f"{len(self.run.prompts)} prompts, call {call.fingerprint()}",
        }

    def begin(self, start: str | None, takes: Takes, steps: int, guidance: float, shared: bool = False) -> Beginning:
        if reason := self.refuses(takes, needs_data=False):
            raise ValueError(reason)
        pipe = copy.copy(self.pipe)
        if shared:
            return Beginning(pipe, self.network)
        transformer = copy.deepcopy(self.transformer) if start is None else self._opened(start)
        transformer = transformer.to(self.device).float().train().requires_grad_(True)
        if transformer._supports_gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        pipe.transformer = transformer
        return Beginning(pipe, RecordedVelocity(transformer, self.recording, self.texts))

    def sampled(self, pipe: DiffusionPipeline, sampling: Sampling) -> DiffusionPipeline:
        if sampling.ladders:
            pipe.scheduler = StudentScheduler(sampling.ladders, sampling.renoise)
        elif not sampling.as_teacher:
            pipe.scheduler = flow_scheduler(pipe.scheduler, second_order=False)
        if "is_distilled" in pipe.config and not sampling.keeps_guidance:
            pipe.register_to_config(is_distilled=True)
        taken = inspect.signature(type(pipe).__call__).parameters
        defaults: dict[str, Any] = {n: v for n, v in WITHOUT_GUIDANCE.items() if n in taken and v is not None}
        if sampling.keeps_guidance:
            defaults = {}
        elif self.embedded:
            defaults["guidance_scale"] = self.default_guidance
        sizes = {name: getattr(self.run, name) for name in SIZES if getattr(self.run, name) is not None}
        set_call_defaults(pipe, "student", num_inference_steps=sampling.steps, **defaults, **sizes)
        return pipe

    def finish(
        self, beginning: Beginning, trained: nn.Module, sampling: Sampling, folder: Path | None
    ) -> DiffusionPipeline:
        pipe, transformer = beginning.pipe, trained.transformer.eval()
        types = {n.replace(".base_layer", ""): w.dtype for n, w in self.transformer.named_parameters()}
        for name, weight in transformer.named_parameters():
            weight.data = weight.data.to(types[name])
        transformer.disable_gradient_checkpointing()
        pipe.transformer = transformer
        self.sampled(pipe, sampling)
        if folder is not None:
            pipe.save_pretrained(folder, safe_serialization=True)
        return pipe

    def decode(self, x: Float[Tensor, "b *s"]) -> Tensor:
        """Pictures (B, C, H, W) or clips (B, F, C, H, W) in [0, 1], by the pipeline's own decoder."""
        made = [decode(self.pipe, self.run, self.network.split(x[i : i + 1])) for i in range(len(x))]
        return torch.cat(made)

    def _opened(self, start: str) -> nn.Module:
        """The transformer of a start. Raises ValueError for one of another kind."""
        transformer = check_kind(load(start, dtype=self.transformer.dtype))
        if _kind(transformer) != _kind(self.transformer):
            raise ValueError(f"{start} has another transformer than {self.name}: start from one of its students")
        return transformer

    def _fitting(self, data: ImageData) -> ImageData:
        if tuple(data.class_names) != tuple(self.run.prompts):
            raise ValueError("the samples are of other prompts than the run's: give the run the prompts of the samples")
        if tuple(data.images.shape[1:]) != self.sample_shape:
            raise ValueError(f"a sample is {self.sample_shape}, the data has {tuple(data.images.shape[1:])}")
        return data.to(self.device)


def _kind(transformer: nn.Module) -> str:
    """Class and configuration, as they come back from a file."""
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    return type(transformer).__name__ + json.dumps(config, sort_keys=True, default=str)


def _guidance(pipe: DiffusionPipeline, run: Run) -> float:
    """The guidance scale of the run: its own, or the call's default."""
    if pipe.config.get("is_distilled"):
        return 1.0
    if run.guidance_scale is not None:
        return run.guidance_scale
    for name in ("true_cfg_scale", "guidance_scale"):
        if name in run.arguments:
            return float(run.arguments[name])
    taken = inspect.signature(type(pipe).__call__).parameters
    two_passes = run.negative_prompt is not None and not embeds_guidance(pipe)
    default = (taken.get("true_cfg_scale") if two_passes else None) or taken.get("guidance_scale")
    return float(default.default) if default is not None and isinstance(default.default, int | float) else 1.0


def _recorded(pipe: DiffusionPipeline, run: Run, device: str | torch.device | None) -> tuple[Any, Texts]:
    """How the transformer is called, and the texts of all prompts and of the empty one."""
    others = [part for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    home = {id(part): part.device for part in others}
    if device is not None:
        for part in others:
            part.to(device)
    recording = record(pipe, run)
    empty = run.negative_prompt or ""
    texts = Texts([_text(record_text(pipe, run, prompt), recording.others) for prompt in (*run.prompts, empty)])
    transformer = next(iter(denoisers(pipe).values()))
    for part in others:
        if part is not transformer:
            part.to(home[id(part)])
    return recording, texts


def _text(arguments: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in known}
