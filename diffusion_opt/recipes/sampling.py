"""Techniques that change how a pipeline is sampled, not what a pass computes: solver, student, compilation.

`Solver` is the baseline every other technique has to beat: fewer steps, or a better formula for the same steps.
`Student` puts a distilled network in the teacher's place, with the scheduler, step count and guidance it was trained
for. `Compile` hands the transformer to torch.compile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from diffusion_opt.models import FlowMatchAdamsBashforthScheduler, load

SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "adams_bashforth2": FlowMatchAdamsBashforthScheduler,
}
_TITLES = {"euler": "Euler", "adams_bashforth2": "Adams-Bashforth"}
_UNDO = "_diffusion_opt_undo"


def _remember(pipe: DiffusionPipeline, technique: Any, **state: Any) -> None:
    pipe.__dict__.setdefault(_UNDO, {})[type(technique).__name__] = state


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
        if self.name not in SCHEDULERS:
            raise ValueError(f"solver must be one of {', '.join(SCHEDULERS)}, got {self.name!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def describe(self) -> str:
        return f"{self.steps} {_TITLES[self.name]} steps"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Swap the scheduler and set the default step count. Raises ValueError on a step-distilled student."""
        if pipe.config.get("is_distilled"):
            raise ValueError("Solver: this student was distilled for its own steps and scheduler; use the teacher")
        _remember(pipe, self, scheduler=pipe.scheduler, default_steps=pipe.config.default_steps)
        pipe.scheduler = SCHEDULERS[self.name].from_config(pipe.scheduler.config)
        pipe.register_to_config(default_steps=self.steps)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the scheduler and step count back."""
        state = _recall(pipe, self)
        pipe.scheduler = state["scheduler"]
        pipe.register_to_config(default_steps=state["default_steps"])


@dataclass(frozen=True, slots=True)
class Student:
    """Use a distilled student in the teacher's place: a shipped name or a folder."""

    model: str

    def describe(self) -> str:
        return f"student {self.model}"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Swap network, scheduler and sampling defaults. Raises ValueError if the student is of another family."""
        student = load(self.model, device=pipe.device, dtype=pipe.transformer.dtype)
        if type(student.transformer) is not type(pipe.transformer):
            raise ValueError(
                f"Student: {self.model} has a {type(student.transformer).__name__}, "
                f"the pipeline a {type(pipe.transformer).__name__}"
            )
        parts = [name for name in ("transformer", "scheduler", "class_embedder") if hasattr(pipe, name)]
        settings = ("is_distilled", "default_steps", "default_guidance", "flow_map", "ladders", "guidance_range")
        _remember(
            pipe,
            self,
            parts={name: getattr(pipe, name) for name in parts},
            settings={name: pipe.config[name] for name in settings},
        )
        for name in parts:
            setattr(pipe, name, getattr(student, name))
        pipe.register_to_config(**{name: student.config[name] for name in settings})
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the teacher back."""
        state = _recall(pipe, self)
        for name, part in state["parts"].items():
            setattr(pipe, name, part)
        pipe.register_to_config(**state["settings"])


@dataclass(frozen=True, slots=True)
class Compile:
    """`torch.compile` each transformer block (diffusers' `compile_repeated_blocks`): slow first call, then faster."""

    def describe(self) -> str:
        return "torch.compile"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Compile the blocks in place; the first call of each new shape pays for it."""
        blocks = [m for m in pipe.transformer.modules() if type(m).__name__ in pipe.transformer._repeated_blocks]
        if not blocks:
            raise ValueError(f"Compile: {type(pipe.transformer).__name__} names no repeated blocks to compile")
        _remember(pipe, self, blocks=blocks)
        for block in blocks:
            block.compile()
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Run the blocks eagerly again."""
        for block in _recall(pipe, self)["blocks"]:
            block._compiled_call_impl = None
        torch.compiler.reset()
