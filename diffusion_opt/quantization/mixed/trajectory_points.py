"""Where a quantized network is trained and judged: the passes of the float network's own generations, as they are made.

A pipeline is run as anyone runs it, and a hook on its transformer keeps what each pass was given and what it gave. So
the points lie on the float network's trajectories, at exactly the times its scheduler visits (the rungs, for a student
of few steps), in both branches of guidance, with whatever else the family's transformer is told; and since sampling the
float network computes its velocity there anyway, the targets cost no pass of their own. Nothing here knows a family:
what has a row for each sample is stacked, everything else has to be the same in all passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.quantization.simulation.calibration import class_prompts

# (pipeline, number of samples, generator of all randomness) -> generates them; what it returns is not used
Generate = Callable[[DiffusionPipeline, int, torch.Generator], Any]


@dataclass(frozen=True)
class TrajectoryPoints:
    """Arguments of passes, stacked into one, and what the network answered: one tensor a stream (LTX-2 has two)."""

    arguments: dict[str, Any]
    rows: frozenset[str]  # arguments that have a row for each point
    outputs: tuple[Tensor, ...]  # each (points, …)

    def __len__(self) -> int:
        return len(self.outputs[0])

    def __getitem__(self, index: Tensor | slice) -> "TrajectoryPoints":
        """Some of the points."""
        arguments = {name: x[index] if name in self.rows else x for name, x in self.arguments.items()}
        return TrajectoryPoints(arguments, self.rows, tuple(output[index] for output in self.outputs))


def random_classes(pipe: DiffusionPipeline, number: int, generator: torch.Generator) -> None:
    """Generate samples of random classes with the pipeline's own steps and guidance."""
    names = class_prompts(pipe)
    chosen = torch.randint(len(names), (number,), generator=generator, device=generator.device)
    pipe(prompt=[names[index] for index in chosen.tolist()], generator=generator, output_type="latent")


def trajectory_points(
    pipe: DiffusionPipeline, number: int, generator: torch.Generator, generate: Generate = random_classes
) -> TrajectoryPoints:
    """All passes of the pipeline's transformer while it generates `number` samples, without gradient.

    Raises ValueError if the pipeline makes no pass, or passes that have unnamed arguments or cannot be stacked.
    """
    calls: list[tuple[dict[str, Any], tuple[Tensor, ...]]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if args:
            raise ValueError(f"{type(module).__name__} was given {len(args)} arguments by position: name them all")
        calls.append((kwargs, outputs_of(output)))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        with torch.no_grad():
            generate(pipe, number, generator)
    finally:
        handle.remove()
        pipe.set_progress_bar_config(**shown)
    if not calls:
        raise ValueError(f"this {type(pipe).__name__} generated without a pass of its transformer")
    return _stacked(calls)


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a transformer's output, whichever way it was asked to return them."""
    values = output if isinstance(output, tuple) else output.to_tuple()
    return tuple(value for value in values if isinstance(value, Tensor))


def velocity_error(transformer: nn.Module, points: TrajectoryPoints, batch_size: int = 64) -> float:
    """Root mean square distance of a transformer's output from that of the points, relative to the latter's size."""
    with torch.no_grad():
        parts = [points[start : start + batch_size] for start in range(0, len(points), batch_size)]
        shares = [len(part) / len(points) * squared_error(transformer, part) for part in parts]
    return float(sum(shares).sqrt())


def squared_error(transformer: nn.Module, points: TrajectoryPoints) -> Float[Tensor, ""]:
    """|output - target|^2 / |target|^2, the mean over streams; has a gradient."""
    outputs = outputs_of(transformer(**points.arguments))
    squares = [
        (output - target).square().sum() / target.square().sum()
        for output, target in zip(outputs, points.outputs, strict=True)
    ]
    return torch.stack(squares).mean()


def _stacked(calls: list[tuple[dict[str, Any], tuple[Tensor, ...]]]) -> TrajectoryPoints:
    """One call in the place of many: rows one after the other."""
    first = calls[0][0]
    batch = len(calls[0][1][0])
    rows = frozenset(name for name, value in first.items() if _has_rows(value, batch))
    arguments = {}
    for name, value in first.items():
        given = [call.get(name) for call, _ in calls]
        if name in rows:
            arguments[name] = torch.cat(given)
        elif all(_same(value, other) for other in given):
            arguments[name] = value
        else:
            raise ValueError(f"the passes of one generation differ in {name!r}, and it has no row for each sample")
    outputs = zip(*(out for _, out in calls), strict=True)
    return TrajectoryPoints(arguments, rows, tuple(torch.cat(parts) for parts in outputs))


def _has_rows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value, other)
    return bool(value == other)
