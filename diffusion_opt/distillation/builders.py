"""From a task (networks, images, trajectories) to the `Distiller` of a method: where options get their values.

One function a method, named in `methods.METHODS`. Trajectory methods get the teacher with guidance, or without where
the scale is part of the method. Distribution methods get a fake score, a copy of the teacher; the ladder of their
student follows from the network it starts as: a flow map goes on along its own jumps, another network predicts the
picture and noises it again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.distribution import (
    AdversarialDistillation,
    DistributionMatching,
    FeatureHeads,
    MatchSettings,
    RegularizedMatching,
    ScoreIdentity,
)
from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.distillation.trajectory import (
    METHODS,
    FlowMapDistillation,
    FlowMapSettings,
    GuidanceDistillation,
    OdeDistillation,
    OdePairs,
    ProgressiveDistillation,
    Refinement,
    RefinementSettings,
    Reflow,
    TruncatedConsistency,
    TruncatedSettings,
    train_progressively,
)
from diffusion_opt.flow import ALL_TIMES, SAMPLERS, VelocityModel, randn, sampling_times
from diffusion_opt.subjects import Samples, Subject
from diffusion_opt.training import TrainConfig, TrainResult
from diffusion_opt.training.lora import LoraSettings, adapters

RENOISED = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.9, 0.75, 0.5)}  # times of students that noise their picture again
FIRST_STAGE = 8  # steps of the first student of progressive distillation


@dataclass(frozen=True)
class Task:
    """What a `Distiller` is built from; networks, samples and trajectories are on one device."""

    student: nn.Module  # in training
    subject: Subject  # the teacher, what can be asked of it, and its data
    guidance: float
    steps: int
    times: tuple[float, ...] = ()  # the student's ladder, where the method has one; none: from its network and steps
    pairs: OdePairs | None = None
    lora: LoraSettings | None = None  # of the student; the fake score gets the same
    fake: nn.Module | None = None  # the fake score, where it shares a base with the student
    guidance_interval: tuple[float, float] = ALL_TIMES  # times at which guidance counts
    fake_updates: int | None = None  # of the critic between two of the student; None: the method's own
    settings: Any = None  # of the method, a frozen dataclass; None: it has none
    seed: int = 0

    @property
    def network(self) -> nn.Module:
        """The teacher without guidance, frozen."""
        return self.subject.network

    @property
    def teacher(self) -> VelocityModel:
        """The teacher with guidance."""
        return self.subject.guided(self.guidance, self.guidance_interval)

    @property
    def data(self) -> Samples | None:
        return self.subject.data

    @property
    def two_time(self) -> bool:
        """Whether the student knows the length of its jumps."""
        return bool(getattr(self.student, "two_time", False))

    def fake_score(self) -> nn.Module:
        """A network that starts as the teacher and will follow the student: a copy, or an adapter on the teacher."""
        if self.fake is not None:
            return self.fake
        if self.lora is not None:
            return adapters(self.network, ("fake_score",), self.lora)["fake_score"]
        fake = copy.deepcopy(self.network).train().requires_grad_(True)
        for weight in fake.parameters():  # a teacher in half precision is fine, a network in training is not
            weight.data = weight.data.float() if weight.element_size() < 4 else weight.data
        return fake

    @torch.no_grad()
    def reference(self) -> Float[Tensor, "n *s"] | None:
        """Pictures of the guided teacher, from 8 second-order steps; None for a subject that has no use for them."""
        num, subject = self.subject.num_reference, self.subject
        if not num:
            return None
        device = next(self.network.parameters()).device
        noise = randn((num, *subject.sample_shape), torch.Generator(device).manual_seed(2**31 + self.seed))
        condition = subject.conditions[torch.arange(num, device=device) % max(len(subject.conditions), 1)]
        return SAMPLERS["adams_bashforth2"](self.teacher, noise, sampling_times(8), condition)


def ladder(steps: int) -> tuple[float, ...]:
    """Evenly spaced times 1, 1 - 1/n, …, 1/n."""
    return tuple(1 - rung / steps for rung in range(steps))


def ode(task: Task) -> OdeDistillation:
    return OdeDistillation(task.student, task.pairs, task.steps)


def reflow(task: Task) -> Reflow:
    return Reflow(task.student, task.pairs)


def refinement(task: Task) -> Refinement:
    if task.lora is not None:
        raise ValueError("refine holds the student that it starts from beside the one in training: train all weights")
    start = copy.deepcopy(task.student).eval().requires_grad_(False)
    settings = task.settings or RefinementSettings()
    return Refinement(
        task.student, start, task.teacher, task.subject.conditions, task.subject.sample_shape, task.times, settings
    )


def guidance(task: Task) -> GuidanceDistillation:
    return GuidanceDistillation(task.student, task.network, task.data, (task.guidance, task.guidance))


def finetune(task: Task) -> FlowMatching:
    return FlowMatching(task.student, task.data, task.settings.drop_condition)


def flow_map(task: Task) -> FlowMapDistillation:
    """The flow-map identity with the settings of the task."""
    return flow_map_with(task.settings)(task)


def flow_map_with(settings: FlowMapSettings) -> Callable[[Task], FlowMapDistillation]:
    """The builder of these settings, whatever those of the task."""

    def build(task: Task) -> FlowMapDistillation:
        teacher = task.teacher if settings.guidance is None else task.network
        return FlowMapDistillation(task.student, teacher, task.data, settings)

    return build


def progressive(task: Task) -> ProgressiveDistillation:
    """The stage of the task's own steps alone; `halve` runs them all."""
    return ProgressiveDistillation(task.student, task.teacher, task.data, task.steps)


def halve(task: Task, config: TrainConfig, out: Path, progress: bool) -> dict[int, TrainResult]:
    """Progressive distillation from `FIRST_STAGE` steps down to the task's; see `train_progressively`."""
    stages = [FIRST_STAGE]
    while stages[-1] > task.steps:
        stages.append(stages[-1] // 2)
    return train_progressively(task.teacher, task.student, task.data, stages, config, out, progress)


def truncated(task: Task) -> TruncatedConsistency:
    """The second stage of a consistency student; the first one is the student as it starts."""
    first = copy.deepcopy(task.student).eval().requires_grad_(False)
    settings: TruncatedSettings = task.settings
    return TruncatedConsistency(
        task.student, task.teacher, task.data, settings.flow_map, first=first, truncated=settings
    )


def matching(task: Task) -> DistributionMatching:
    return DistributionMatching(**matching_options(task))


def score_identity(task: Task) -> ScoreIdentity:
    return ScoreIdentity(**matching_options(task))


def score_identity_with_head(task: Task) -> ScoreIdentity:
    """SiDA."""
    return ScoreIdentity(**head_options(task))


def matching_with_head(task: Task) -> DistributionMatching:
    """DMD2 with its GAN head, or f-distill, as the divergence of the settings says."""
    return DistributionMatching(**head_options(task))


def regularized(task: Task) -> RegularizedMatching:
    """The loss along the path is that of the family the student belongs to."""
    trajectory = flow_map_with(METHODS["flow_map" if task.two_time else "consistency"])(task)
    return RegularizedMatching(**matching_options(task), trajectory=trajectory.losses)


def adversarial(task: Task) -> AdversarialDistillation:
    head = FeatureHeads.of(task.network, task.subject.sample_shape, task.subject.conditions)
    return AdversarialDistillation(**rollout_options(task), network=task.network, head=head, data=task.data)


def rollout_options(task: Task) -> dict[str, Any]:
    """What every method with a `StudentRollout` is built from: the student, its ladder, and the method's settings."""
    updates = {} if task.fake_updates is None else {"fake_updates": task.fake_updates}
    own = task.settings.options() if isinstance(task.settings, MatchSettings) else {}
    return (
        updates
        | own
        | {
            "student": task.student,
            "sample_shape": task.subject.sample_shape,
            "conditions": task.subject.conditions,
            "times": task.times or (ladder(task.steps) if task.two_time else RENOISED[task.steps]),
            "between": "jump" if task.two_time else "noise",
        }
    )


def matching_options(task: Task) -> dict[str, Any]:
    """The same for `DistributionMatching` and what derives from it: with the teacher and a fake score."""
    return rollout_options(task) | {
        "reference": task.reference(),
        "teacher": task.teacher,
        "fake_score": task.fake_score(),
    }


def head_options(task: Task) -> dict[str, Any]:
    """The same with a GAN head on the fake score and real pictures. Raises ValueError for adapters."""
    if task.lora is not None:
        raise ValueError("the GAN head reads the fake score's blocks; with LoRA it has none of its own: use dmd2")
    options = matching_options(task)
    head = FeatureHeads.of(options["fake_score"], task.subject.sample_shape, task.subject.conditions)
    if options.get("bins") is not None:
        options["bins"].to(next(head.parameters()).device)
    return options | {"head": head, "data": task.data}
