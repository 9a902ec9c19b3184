"""Quantization-aware distillation: a network gets used to its roundings, with its own float self as the teacher.

    pipe = quantization_aware(load("fashion-4step"), PTQ("nvfp4"), config, out)

Post-training quantization leaves the weights where they were trained and hopes. Here they move on, through the rounding
and not around it: the forward pass is the quantized one, the backward pass goes straight through each rounding (Bengio
et al. 2013, arXiv 1308.3432). The target is not data but the velocity v of the float network, at points of that
network's own generations (`trajectory_points.py`):

    loss = |v_q(x_t, t, c) - v(x_t, t, c)|^2 / |v(x_t, t, c)|^2

So no pictures are needed, guidance and distillation stay as they are, and what is minimized is the very error that
quantization made (quantization-aware distillation; Nagel et al. 2021, arXiv 2106.08295, section 4, for training through
fake quantization as such).

**The learning rate follows the error.** Training pays as long as a step is small beside what quantization has broken.
A rate that repairs INT4 ruins INT8, whose error it exceeds, so the rate is a base times the measured relative error of
the quantized network before training: `config.learning_rate` is the rate at an error of 1.

What is quantized is whatever the techniques put there: modelopt's quantizers in the linears, low-precision attention,
or both. Calibrated ranges stay as calibration found them; they are no parameters. A resumed run calibrates again, to
the same ranges, and then takes all from its checkpoint. modelopt's own distillation (`mtd.convert`) replaces the module
by one that holds teacher and student; its wrapper of diffusers' attention has no backward pass.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.models.fingerprint import identity
from diffusion_opt.quantization.mixed.trajectory_points import (
    Generate,
    TrajectoryPoints,
    only_denoiser,
    squared_error,
    trajectory_points,
    velocity_error,
)
from diffusion_opt.subjects import Run
from diffusion_opt.training import Role, TrainConfig, train

# The rate at an error of 1. Measured: benchmarks/results/quantization.json, "learning_rate".
QAT = TrainConfig(
    minutes=2, clock="process", batch_size=32, learning_rate=2e-3, warmup_steps=10, ema_decay=0.98, log_every=10
)
_FIRST_LOOK = 8  # samples behind the error before training
_NOISE = 1e-5  # an error that batches of another size make as well


class Quantization(Protocol):
    """A technique that makes a pipeline's transformer compute in fewer bits."""

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline: ...

    def remove(self, pipe: DiffusionPipeline) -> None: ...


@dataclass
class SelfDistillation:
    """A `Distiller` that fits a quantized `student` to the passes of the float pipeline `teacher`.

    Each step samples the teacher anew, as many samples as fill a batch with their passes.
    """

    student: nn.Module
    teacher: DiffusionPipeline
    run: Run | Generate | None = None
    techniques: Sequence[Quantization] = ()  # that made the student; told, so that another one is not resumed

    def __post_init__(self) -> None:
        self.model = identity(only_denoiser(self.teacher)).describe()
        look = torch.Generator(self.teacher.device).manual_seed(0)
        points = trajectory_points(self.teacher, _FIRST_LOOK, look, self.run)
        self.passes = len(points) // _FIRST_LOOK  # of a sample
        self.start_error = velocity_error(self.student, points)
        if not _NOISE < self.start_error < float("inf"):
            raise ValueError(
                f"the student differs from its float self by {self.start_error:.1e} (relative), which is "
                + ("nothing: quantize it first" if self.start_error <= _NOISE else "beyond repair: check its ranges")
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint is compared by beside the plain fields: the model, and every technique's options."""
        named = {str(index): {"name": type(one).__name__, "of": one} for index, one in enumerate(self.techniques)}
        return {"model": self.model, "technique": named}

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student, rate=self.start_error)}

    def turn(self, step: int) -> str:
        return "student"

    def points(self, generator: torch.Generator, batch_size: int) -> TrajectoryPoints:
        """`batch_size` passes of fresh samples, in random order; all from the generator."""
        points = trajectory_points(self.teacher, -(-batch_size // self.passes), generator, self.run)
        order = torch.randperm(len(points), generator=generator, device=generator.device)
        return points[order[:batch_size]]

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """The squared relative error of a batch."""
        loss = squared_error(self.student, self.points(generator, batch_size))
        return {"loss": loss, "relative_error": loss.detach().sqrt()}


def quantization_aware(
    pipe: DiffusionPipeline,
    technique: Quantization | Sequence[Quantization],
    config: TrainConfig,
    out: Path,
    *,
    run: Run | Generate | None = None,
    progress: bool = True,
) -> DiffusionPipeline:
    """Quantize a pipeline in place and train it to its float self; resumes from `out`. Returns the pipeline.

    The techniques are applied in order and stay on: the result is sampled as it is, and the weights are the average
    over training. `run` says how to sample the float pipeline (default: random classes, its own steps). Raises
    ValueError if a technique refuses the pipeline, if the pipeline has two transformers, or if `out` holds the run of
    another model, other techniques or other settings; the pipeline is then as it was.
    """
    only_denoiser(pipe)
    teacher = copy.deepcopy(pipe)
    teacher.transformer.requires_grad_(False)
    techniques = list(technique) if isinstance(technique, Sequence) else [technique]
    apply_all(pipe, techniques)
    try:
        result = train(SelfDistillation(pipe.transformer, teacher, run, techniques), config, out, progress)
    except BaseException:
        for one in reversed(techniques):
            one.remove(pipe)
        pipe.transformer.load_state_dict(teacher.transformer.state_dict())
        raise
    pipe.transformer.load_state_dict(result.ema.state_dict())
    return pipe


def apply_all(pipe: DiffusionPipeline, techniques: Sequence[Quantization]) -> None:
    """Apply all techniques, or none: if one raises, those before it are taken off again."""
    done: list[Quantization] = []
    try:
        for technique in techniques:
            technique.apply(pipe)
            done.append(technique)
    except BaseException:
        for technique in reversed(done):
            technique.remove(pipe)
        raise
