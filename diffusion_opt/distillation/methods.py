"""The methods by name: what each one learns from, which step counts it serves, and the settings it starts from.

A method is a `Distiller` (what is trained, and the loss) and three answers:

    network     "one time": a copy of the teacher; "two times": a flow map; "guidance": the scale is an input;
                "start": that of the student it starts from
    sampling    "path": along the teacher's path, at the trained times only; "any": for any number of steps;
                "renoise": predict the picture and noise it again; "start": as the student it starts from;
                "teacher": as the teacher
    images      what it wants of the training images: "none"; "noised", as places to compare teacher and student at;
                "learned", as the target

`METHODS` holds them in the order of teaching. Presets are for the shipped teacher `fashion` on two CPU cores; what they
reached stands in the cards of the shipped students, and all methods side by side, at one budget on a smaller teacher,
in `benchmarks/results/distillation_methods.json`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffusion_opt.distillation import builders as build
from diffusion_opt.distillation.builders import RENOISED, Task
from diffusion_opt.distillation.distribution import AdversarialSettings, HeadSettings, IdentitySettings, MatchSettings
from diffusion_opt.distillation.flow_matching import FlowMatchingSettings
from diffusion_opt.distillation.trajectory import METHODS as SETTINGS
from diffusion_opt.distillation.trajectory import TAU, PairConfig, RefinementSettings, TruncatedSettings
from diffusion_opt.names import add
from diffusion_opt.training import Distiller, TrainConfig, TrainResult, train

PAIRS = PairConfig(num_pairs=10_240, guidance_scale=2.0, num_rungs=4, num_steps=12)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to make a student."""

    summary: str  # one line for `diffusion-opt distill --help`
    kind: Literal["trajectory", "distribution"]
    presets: dict[int, TrainConfig]  # by the step counts it serves
    build: Callable[[Task], Distiller]
    network: Literal["one time", "two times", "guidance", "start"] = "one time"
    sampling: Literal["path", "any", "renoise", "start", "teacher"] = "path"
    images: Literal["none", "noised", "learned"] = "none"
    pairs: bool = False  # learns from the store of teacher trajectories
    starts: dict[int, str] | None = None  # by step count, the method of the student it starts from; None: the teacher
    stages: bool = False  # halves the steps from 8 on, a run for each
    guided: bool = True  # learns from the guided teacher; else a guidance scale does nothing and is refused
    adapts: bool = True  # trains adapters too; an exact derivative in time does not go through them
    ladders: dict[int, tuple[float, ...]] | None = None  # its own times by step count; None: evenly spaced
    settings: Any = None  # its own, a frozen dataclass that holds the defaults; None: nothing can be changed

    def fit(
        self, task: Task, config: TrainConfig, out: Path, progress: bool, distiller: Distiller | None = None
    ) -> dict[int, TrainResult]:
        """Train (or resume) in `out`; results by step count, the last one that of the task unless interrupted.

        `distiller` is what `build` made of the task, if that was done already.
        """
        if self.stages:
            return build.halve(task, config, out, progress)
        return {task.steps: train(distiller or self.build(task), config, out, progress)}


ALONG_PATH = TrainConfig(minutes=10, learning_rate=5e-4, warmup_steps=50, ema_decay=0.998)
MATCHING = TrainConfig(minutes=8, learning_rate=2e-4, warmup_steps=50, ema_decay=0.98, betas=(0.0, 0.99))
LONG = replace(ALONG_PATH, minutes=45)
JUMPS = {"presets": dict.fromkeys((1, 2, 4, 8), LONG), "network": "two times", "sampling": "any"}
TO_PICTURE = {"presets": dict.fromkeys(RENOISED, LONG), "sampling": "renoise"}
MATCH = {
    "presets": dict.fromkeys(RENOISED, MATCHING),
    "network": "start",
    "sampling": "start",
    "starts": {1: "ode", 2: "flow_map", 4: "flow_map"},
}

METHODS: dict[str, Method] = {
    "finetune": Method(
        summary="no student: the teacher trained on with real samples, sampled and guided as before",
        kind="trajectory",
        presets=dict.fromkeys((8, 16, 25, 50), ALONG_PATH),
        build=build.finetune,
        settings=FlowMatchingSettings(),
        sampling="teacher",
        images="learned",
        guided=False,
    ),
    "guidance": Method(
        summary="one pass does the work of the two of guidance; as many steps as the teacher",
        kind="trajectory",
        presets=dict.fromkeys((8, 16, 25, 50), ALONG_PATH),
        build=build.guidance,
        sampling="teacher",
        images="noised",
    ),
    "ode": Method(
        summary="regression along stored paths of the teacher (knowledge distillation)",
        kind="trajectory",
        presets={1: replace(ALONG_PATH, minutes=12), 2: ALONG_PATH, 4: ALONG_PATH},
        build=build.ode,
        pairs=True,
    ),
    "reflow": Method(
        summary="straight lines between noise and the picture that the teacher makes of it",
        kind="trajectory",
        presets=dict.fromkeys((1, 2, 4, 8), ALONG_PATH),
        build=build.reflow,
        sampling="any",
        pairs=True,
    ),
    "progressive": Method(
        summary="half as many steps with each stage, 8, 4, 2, 1; all students of the way are kept",
        kind="trajectory",
        presets={8: ALONG_PATH, 4: replace(LONG, minutes=20), 2: replace(LONG, minutes=30), 1: LONG},
        build=build.progressive,
        images="noised",
        stages=True,
    ),
    "flow_map": Method(
        "jumps between any two times: one student for 1, 2, 4 and more steps",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["flow_map"],
        images="noised",
        **JUMPS,
    ),
    "shortcut": Method(
        "a flow map that learns each jump from two of its own, half as long",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["shortcut"],
        images="noised",
        **JUMPS,
    ),
    "mean_flow": Method(
        "a flow map in the limit of short hops, by an exact derivative, which is unstable on FLUX.2",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["mean_flow"],
        images="noised",
        adapts=False,
        **JUMPS,
    ),
    "mean_flow_difference": Method(
        "the same by a difference over 0.02 of time, which is stable there",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["mean_flow_difference"],
        images="noised",
        **JUMPS,
    ),
    "mean_flow_data": Method(
        "the exact one, taught by the images and not by the teacher",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["mean_flow_data"],
        images="learned",
        guided=False,
        adapts=False,
        **JUMPS,
    ),
    "consistency": Method(
        "jumps from any time to the picture, taught by the teacher's short hops",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["consistency"],
        images="noised",
        **TO_PICTURE,
    ),
    "tcm": Method(
        "a consistency student goes on, for the noisy part of time alone; one step",
        "trajectory",
        presets={1: replace(LONG, minutes=20)},
        build=build.truncated,
        settings=TruncatedSettings(),
        network="start",
        sampling="start",
        images="noised",
        starts={1: "consistency"},
    ),
    "consistency_training": Method(
        "the same, with hops along the images and not along the teacher's path",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["consistency_training"],
        images="learned",
        guided=False,
        **TO_PICTURE,
    ),
    "scm": Method(
        "consistency in the limit of short hops, its tangent scaled; unstable on FLUX.2 likewise",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["scm"],
        images="noised",
        adapts=False,
        **TO_PICTURE,
    ),
    "lcm": Method(
        "consistency with the guidance scale as an input of the student",
        "trajectory",
        build=build.flow_map,
        settings=SETTINGS["lcm"],
        images="noised",
        network="guidance",
        **TO_PICTURE,
    ),
    "refine": Method(
        "pictures of a student of one step, finished by one pass of the teacher: takes off grain",
        "trajectory",
        presets=dict.fromkeys((1, 2), replace(ALONG_PATH, minutes=20, learning_rate=2e-4, ema_decay=0.99)),
        build=build.refinement,
        starts={1: "sid", 2: "sid"},
        ladders={2: (1.0, TAU)},
        adapts=False,
        settings=RefinementSettings(),
    ),
    "dmd2": Method(
        "moves the student's distribution to the teacher's; a fake score follows the student",
        "distribution",
        build=build.matching,
        settings=MatchSettings(),
        **MATCH,
    ),
    "dmd2_gan": Method(
        "the same, with a discriminator that sees real pictures",
        "distribution",
        build=build.matching_with_head,
        settings=HeadSettings(),
        images="learned",
        **MATCH,
    ),
    "f_distill": Method(
        "the same, with weights that make it descend the forward KL and so cover modes",
        "distribution",
        build=build.matching_with_head,
        settings=HeadSettings(divergence="kl"),
        images="learned",
        **MATCH,
    ),
    "sid": Method(
        "descends the difference of the two scores itself, through both networks",
        "distribution",
        build=build.score_identity,
        settings=IdentitySettings(),
        **MATCH,
    ),
    "sida": Method(
        "sid with a discriminator that sees real pictures",
        "distribution",
        build=build.score_identity_with_head,
        settings=IdentitySettings(),
        images="learned",
        **MATCH,
    ),
    "ladd": Method(
        "a discriminator on the teacher's features alone, student against real pictures",
        "distribution",
        build=build.adversarial,
        settings=AdversarialSettings(),
        images="learned",
        guided=False,
        **MATCH,
    ),
    "rcm": Method(
        "distribution matching and a loss along the teacher's path together",
        "distribution",
        build=build.regularized,
        settings=MatchSettings(),
        images="noised",
        **{**MATCH, "starts": dict.fromkeys(RENOISED, "flow_map")},
    ),
}


def register(name: str, method: Method) -> None:
    """Add a method from outside, see `diffusion_opt.plugins`. Raises ValueError for a name that is taken or no word."""
    add("method", name, method, METHODS)


def method_named(name: str) -> Method:
    """A method by name, hyphens and underscores alike. Raises ValueError with the names there are."""
    found = METHODS.get(name.replace("-", "_"))
    if found is None:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return found
