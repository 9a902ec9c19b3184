"""One pipeline, any pipeline, as something to measure.

`as_rung` gives what `evaluation.measure_together` compares: a function from prompts and a generator to pictures or
clips in [-1, 1], and the network whose passes are counted. A class-conditional pipeline of this repository needs no
more. Any other one needs a `Run`, which says what to ask of it: prompts, steps, sizes.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffusion_opt.evaluation import Measurement, Rung, measure_together
from diffusion_opt.models.call_defaults import call_defaults
from diffusion_opt.recipes.sampling import is_solved
from diffusion_opt.subjects import Run, denoisers


def as_rung(pipe: DiffusionPipeline, run: Run | None = None) -> Rung:
    """A pipeline as something to measure; without a run it is asked for classes by their numbers.

    Raises ValueError for a pipeline without classes and without a run, and for a run that its call does not take.
    """
    if run is None:
        if getattr(pipe, "class_embedder", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no classes to ask for: pass run=Run(prompts, …)")
        return Rung(lambda labels, generator: _made(pipe, labels.tolist(), generator, {}), network_of(pipe))
    run.check(pipe)
    return Rung(lambda prompts, generator: _made(pipe, list(prompts), generator, run.settings), network_of(pipe))


def _made(pipe: DiffusionPipeline, prompts: list, generator: torch.Generator, settings: dict[str, Any]) -> Tensor:
    if isinstance(settings.get("negative_prompt"), str):
        settings = settings | {"negative_prompt": [settings["negative_prompt"]] * len(prompts)}
    made = pipe(prompt=prompts, generator=generator, output_type="pt", return_dict=False, **settings)[0]
    return made.float() * 2 - 1


def run_under(pipe: DiffusionPipeline, run: Run) -> Run:
    """The run as a pipeline with a student or a solver on it is asked: not the teacher's steps, nor its guidance."""
    own = call_defaults(pipe)
    distilled = bool(pipe.config.get("is_distilled")) or "sigmas" in own
    left = {"num_inference_steps"} if distilled or "num_inference_steps" in own or is_solved(pipe) else set()
    left |= {"guidance_scale"} if distilled or "guidance_scale" in own else set()
    return replace(run, **dict.fromkeys(left))


def measure(
    pipe: DiffusionPipeline, run: Run | None = None, *, device: str | None = None, **settings: Any
) -> Measurement:
    """Speed, cost and quality of one pipeline; settings as in `evaluation.measure_together`.

    With a run, prompts, batch size and seed are those of the run, and nobody judges unless `judges` are named. To
    compare pipelines measure them together (`measure_together`, `run_ladder`): separate runs do not compare. Raises
    what `as_rung` and `measure_together` raise.
    """
    rungs = {"pipeline": as_rung(pipe, run)}
    device = device or next(rungs["pipeline"].transformer.parameters()).device.type
    if run is None:
        settings = {"num_classes": pipe.class_embedder.num_classes} | settings
    else:
        settings = {"prompts": run.prompts, "batch_size": run.batch_size, "seed": run.seed} | settings
        settings |= {} if settings.get("judges") else {"num_samples": 0, "judges": ()}
    return measure_together(rungs, device=device, **settings)["pipeline"]


def network_of(pipe: DiffusionPipeline) -> nn.Module:
    """The denoising network; of several, one module whose passes are those of all."""
    networks = list(denoisers(pipe).values())
    return networks[0] if len(networks) == 1 else _Together(networks)


class _Together(nn.ModuleList):
    """Hooks go to each network, because only they are called."""

    def register_forward_pre_hook(self, *arguments: Any, **settings: Any) -> "_Handles":
        return _Handles([network.register_forward_pre_hook(*arguments, **settings) for network in self])

    def register_forward_hook(self, *arguments: Any, **settings: Any) -> "_Handles":
        return _Handles([network.register_forward_hook(*arguments, **settings) for network in self])


class _Handles(list[RemovableHandle]):
    """Handles of several hooks, removed together."""

    def remove(self) -> None:  # type: ignore[override]
        for handle in self:
            handle.remove()
