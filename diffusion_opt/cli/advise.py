"""`diffusion-opt advise`: what a pipeline is, what to do with it in which order, and the commands to type.

    diffusion-opt advise fashion
    diffusion-opt advise black-forest-labs/FLUX.2-dev          from its configuration: no weights, no network
    diffusion-opt advise DIR --prompts "a cat" --steps 28

Every technique is tried on the pipeline, built without weights from its configurations.
"""

import shlex
from typing import TYPE_CHECKING

from diffusion_opt.cli.options import ASKED, Asked, Model, check_model
from diffusion_opt.names import KNOWN, SHIPPED

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_opt.subjects import Run


def advise(model: Model, asked: Asked = ASKED) -> None:
    """Say which techniques apply to a pipeline, which are refused, which are useless on it and why, and what to type.

    Args:
        model: shipped name, folder (weights are not needed), hub name, or the short name of a model whose
            configuration is shipped, such as flux2-dev, ltx-2 or wan2.2.
    """
    from diffusion_opt.recipes.advice import advise as ask

    pipe, run, name = without_weights(model, asked)
    for line in ask(pipe, run, name, flags(asked, name)).lines():
        print(line)
    if short := next((ours for ours, theirs in KNOWN.items() if name == theirs), None):
        from diffusion_opt.recipes.presets import GOALS, preset

        print("\npresets to begin with, diffusion_opt.preset(…)")
        for goal in GOALS:
            print(f"  {preset(short, goal).describe()}")


def without_weights(model: str, asked: Asked) -> "tuple[DiffusionPipeline, Run, str]":
    """The pipeline of a model on the meta device, its run, and the name to type for it."""
    if model in KNOWN or model in KNOWN.values():
        from diffusion_opt.subjects import known

        own = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance}
        sizes = {"height": asked.height, "width": asked.width, "num_frames": asked.num_frames}
        prompts = asked.texts() or ("a prompt",)
        return known.skeleton(model), known.run(model, prompts, **own, **sizes), KNOWN.get(model, model)
    check_model(model)
    from dataclasses import replace

    from diffusion_opt.models.zoo import configs_of
    from diffusion_opt.subjects import plan as plans

    pipe = plans.skeleton(configs_of(model))
    if not asked.texts() and not hasattr(pipe, "class_embedder"):
        asked = replace(asked, prompts=("a prompt",))
    return pipe, asked.run(pipe), model


def flags(asked: Asked, model: str) -> list[str]:
    """What was asked, as it is typed again."""
    prompts = asked.prompts or (() if model in SHIPPED else ("a prompt",))
    typed = ["--prompts", *map(shlex.quote, prompts)] if prompts else []
    for name in ("steps", "guidance", "height", "width", "num_frames", "negative_prompt", "call"):
        if (value := getattr(asked, name)) is not None:
            typed += [f"--{name.replace('_', '-')}", shlex.quote(str(value))]
    return typed
