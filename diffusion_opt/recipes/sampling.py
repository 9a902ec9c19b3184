"""Techniques that change how a pipeline is sampled, not what a pass computes: solver, student, compilation.

`Solver` is the baseline every other technique has to beat: fewer steps, or a better formula for the same steps.
`Student` puts a distilled network in the teacher's place, with the scheduler, step count and guidance it was trained
for. `Compile` hands the transformers to torch.compile.

They serve any pipeline with a denoising transformer (Wan 2.2 has two) and, for `Solver`, a flow scheduler. Steps and
guidance become the pipeline's defaults (`models/call_defaults.py`): what a call says still counts.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.datasets import read_json
from diffusion_opt.models import flow_scheduler
from diffusion_opt.models.call_defaults import call_defaults, drop_call_defaults, set_call_defaults
from diffusion_opt.models.opening import DENOISERS, read_index
from diffusion_opt.models.zoo import QUANTIZED, RECIPE, locate, open_pipeline
from diffusion_opt.quantization.packed.storage import load_quantized
from diffusion_opt.subjects import denoisers

SOLVERS = {"euler": "Euler", "adams_bashforth2": "Adams-Bashforth"}
_UNDO = "_diffusion_opt_undo"
_OWN_SETTINGS = ("is_distilled", "default_steps", "default_guidance", "flow_map", "ladders", "guidance_range")
_SHAPES = (  # of the inputs and outputs of a transformer: a student's must be its teacher's
    "in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim", "cross_attention_dim",
    "caption_channels", "text_dim", "audio_in_channels",
)  # fmt: skip


def _remember(pipe: DiffusionPipeline, technique: Any, **state: Any) -> None:
    undo = pipe.__dict__.setdefault(_UNDO, {})
    if type(technique).__name__ in undo:
        raise ValueError(f"{type(technique).__name__} is applied to this pipeline already: remove it first")
    undo[type(technique).__name__] = state


def _recall(pipe: DiffusionPipeline, technique: Any) -> dict[str, Any]:
    """What to put back. Raises ValueError if the technique is not on this pipeline."""
    undo = pipe.__dict__.get(_UNDO, {})
    if type(technique).__name__ not in undo:
        raise ValueError(f"{type(technique).__name__} is not applied to this pipeline, so it cannot be removed")
    return undo.pop(type(technique).__name__)


@dataclass(frozen=True, slots=True)
class Solver:
    """Sample with another solver and step count: `adams_bashforth2` is second order at one evaluation a step."""

    steps: int
    name: str = "adams_bashforth2"

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.name!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def describe(self) -> str:
        return f"{self.steps} {SOLVERS[self.name]} steps"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Swap the scheduler, keeping its shift and times, and set the default step count.

        Raises ValueError on a step-distilled student, and for a scheduler that solves no flow. Warns where a multistep
        solver such as Wan's UniPC is what is replaced.
        """
        denoisers(pipe)
        if pipe.config.get("is_distilled") or "sigmas" in call_defaults(pipe):
            raise ValueError("Solver: this student was distilled for its own steps and scheduler; use the teacher")
        try:
            scheduler = flow_scheduler(pipe.scheduler, second_order=self.name != "euler")
        except ValueError as error:
            raise ValueError(f"Solver: {error}") from error
        _remember(pipe, self, scheduler=pipe.scheduler, default_steps=pipe.config.get("default_steps"))
        if "flow_shift" in pipe.scheduler.config:
            warnings.warn(
                f"Solver: {SOLVERS[self.name]} replaces {type(pipe.scheduler).__name__}, which is of second order "
                "itself, at the same times: compare with fewer steps of the one that came with the pipeline",
                stacklevel=2,
            )
        pipe.scheduler = scheduler
        if "default_steps" in pipe.config:
            pipe.register_to_config(default_steps=self.steps)
        else:
            set_call_defaults(pipe, "Solver", num_inference_steps=self.steps)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the scheduler and step count back."""
        state = _recall(pipe, self)
        pipe.scheduler = state["scheduler"]
        if state["default_steps"] is not None:
            pipe.register_to_config(default_steps=state["default_steps"])
        drop_call_defaults(pipe, "Solver")


@dataclass(frozen=True, slots=True)
class Student:
    """Use a distilled student in the teacher's place: the shipped name or folder of a pipeline of the same kind."""

    model: str

    def describe(self) -> str:
        return f"student {self.model}"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Swap network, scheduler and sampling defaults; the other parts (text encoders, VAE) are not opened again.

        Raises ValueError if the student is of another family or of other shapes, and for a pipeline that is offloaded.
        """
        networks = denoisers(pipe)
        if any(hasattr(part, "_hf_hook") for part in networks.values()):
            raise ValueError("Student: this pipeline is offloaded; apply the student first and offload then")
        folder = locate(self.model)
        self._check(folder, networks)
        student = self._opened(folder, pipe, networks)
        names = [name for name in (*networks, "scheduler", "class_embedder") if hasattr(pipe, name)]
        settings = [name for name in _OWN_SETTINGS if name in pipe.config and name in student.config]
        _remember(
            pipe,
            self,
            parts={name: getattr(pipe, name) for name in names},
            settings={name: pipe.config[name] for name in settings},
        )
        for name in names:
            setattr(pipe, name, getattr(student, name))
        pipe.register_to_config(**{name: student.config[name] for name in settings})
        if defaults := call_defaults(student):
            set_call_defaults(pipe, "Student", **defaults)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the teacher back."""
        state = _recall(pipe, self)
        for name, part in state["parts"].items():
            setattr(pipe, name, part)
        pipe.register_to_config(**state["settings"])
        drop_call_defaults(pipe, "Student")

    def _opened(self, folder: Path, pipe: DiffusionPipeline, networks: dict[str, nn.Module]) -> DiffusionPipeline:
        """The student's pipeline around the teacher's other parts, in its type and on its device."""
        dtype = next(iter(networks.values())).dtype
        if (folder / QUANTIZED).is_file():
            return load_quantized(folder, dtype=dtype, device=pipe.device)
        own = {*networks, "scheduler", "class_embedder"}
        shared = {name: part for name, part in pipe.components.items() if name not in own}
        student = open_pipeline(folder, dtype, **shared)
        for part in student.components.values():
            if isinstance(part, nn.Module):
                part.to(pipe.device)
        return student

    def _check(self, folder: Path, teachers: dict[str, nn.Module]) -> None:
        """Raise ValueError unless the networks of the folder take the place of these; nothing is opened for that."""
        index = read_index(folder)
        if (folder / RECIPE).is_file() and (more := read_json(folder / RECIPE, "save it again").get("techniques")):
            names = ", ".join(entry["technique"] for entry in more)
            raise ValueError(
                f"Student: {self.model} holds a recipe besides its network ({names}): open it with diffusion_opt.load, "
                "or name the folder of the student alone"
            )
        students = {name: index[name][1] for name in DENOISERS if isinstance(index.get(name), list) and index[name][1]}
        if students.keys() != teachers.keys():
            raise ValueError(
                f"Student: {self.model} denoises with {', '.join(students)}, the pipeline with {', '.join(teachers)}"
            )
        for name, teacher in teachers.items():
            if students[name] != type(teacher).__name__:
                raise ValueError(
                    f"Student: {self.model} has a {students[name]}, the pipeline a {type(teacher).__name__}"
                )
            config = read_json(folder / name / "config.json", "save the student again")
            for key in _SHAPES:
                ours, theirs = (_plain(found.get(key)) for found in (teacher.config, config))
                if ours != theirs:
                    raise ValueError(f"Student: {self.model} has {key}={theirs}, the pipeline {ours}")


@dataclass(frozen=True, slots=True)
class Compile:
    """`torch.compile` each transformer block (diffusers' `compile_repeated_blocks`): slow first call, then faster."""

    def describe(self) -> str:
        return "torch.compile"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Compile the blocks of all denoising networks in place; the first call of each new shape pays for it."""
        blocks = [block for network in denoisers(pipe).values() for block in repeated_blocks(network)]
        _remember(pipe, self, blocks=blocks)
        for block in blocks:
            block.compile()
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Run the blocks eagerly again."""
        for block in _recall(pipe, self)["blocks"]:
            block._compiled_call_impl = None
        torch.compiler.reset()


def is_solved(pipe: DiffusionPipeline) -> bool:
    """Whether `Solver` is on a pipeline."""
    return Solver.__name__ in pipe.__dict__.get(_UNDO, {})


def is_compiled(pipe: DiffusionPipeline) -> bool:
    """Whether `Compile` is on a pipeline."""
    return Compile.__name__ in pipe.__dict__.get(_UNDO, {})


def _plain(value: Any) -> Any:
    """A setting as it is before and after it was saved: JSON knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: those its class names, otherwise the entries of its longest lists.

    Raises ValueError if it has none.
    """
    named = getattr(network, "_repeated_blocks", None) or ()
    blocks = [module for module in network.modules() if type(module).__name__ in named]
    if not blocks:
        lists = [part for part in network.children() if isinstance(part, nn.ModuleList) and len(part) > 1]
        blocks = [block for part in lists for block in part]
    if not blocks:
        raise ValueError(f"Compile: {type(network).__name__} has no repeated blocks to compile")
    return blocks
