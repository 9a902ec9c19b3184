"""Where a quantized network is trained and judged: the passes of the float network's own generations, as they are made.

A pipeline is run as anyone runs it, and a hook on its transformer keeps what each pass was given and what it gave. So
the points lie on the float network's trajectories, at exactly the times its scheduler visits (the rungs, for a student
of few steps), in both branches of guidance, with whatever else the family's transformer is told; and since sampling the
float network computes its velocity there anyway, the targets cost no pass of their own. Nothing here knows a family:
what has a row for each sample is stacked, everything else has to be the same in all passes.

What is kept is what is needed: `keep` chooses passes by their time while they are made, and a limit on bytes is checked
as they come, because one pass of a large model is tens of megabytes, and a generation has a hundred.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.quantization.simulation.calibration import quiet
from diffusion_opt.subjects import Run, denoisers

# (pipeline, number of samples, generator of all randomness) -> generates them; what it returns is not used. For what a
# `Run` cannot say, such as ready embeddings of prompts.
Generate = Callable[[DiffusionPipeline, int, torch.Generator], Any]
MAX_BYTES = 4 * 2**30  # of points that are held at once
PASS_ELEMENTS = 2**22  # numbers that go into one pass over points, unless a single point has more
PASS_POINTS = 64


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


def only_denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The one denoiser of a pipeline. Raises ValueError for a pipeline with two of them, and for a UNet."""
    networks = denoisers(pipe)
    if len(networks) > 1:
        raise ValueError(
            f"this {type(pipe).__name__} has two transformers ({', '.join(networks)}), each for its own part of the "
            "times: name one, or use what acts on both: PTQ, pack, W8A8 and DynamicInt8. Mixtures of formats and "
            "training are made for pipelines with one"
        )
    return next(iter(networks.values()))


def denoiser(pipe: DiffusionPipeline, network: str | None) -> nn.Module:
    """One denoiser by its name, or the only one. Raises ValueError as `only_denoiser`, and for a wrong name."""
    if network is None:
        return only_denoiser(pipe)
    networks = denoisers(pipe)
    if network not in networks:
        raise ValueError(f"this {type(pipe).__name__} has no denoiser {network!r}; it has {', '.join(networks)}")
    return networks[network]


def as_generate(run: Run | Generate | None) -> Generate:
    """How samples are made: prompts drawn at random from those of the run, or from the pipeline's classes.

    They come in batches of `run.batch_size`; without a run, all at once.
    """
    if callable(run):
        return run

    def generate(pipe: DiffusionPipeline, number: int, generator: torch.Generator) -> None:
        asked = Run.for_pipeline(pipe, batch_size=number) if run is None else run
        asked.check(pipe)
        drawn = torch.randint(len(asked.prompts), (number,), generator=generator, device=generator.device).tolist()
        for indices in asked.batches(number):
            call = asked.call([drawn[index] for index in indices], output_type="latent")
            pipe(**call | {"generator": generator})

    return generate


def trajectory_points(
    pipe: DiffusionPipeline,
    number: int,
    generator: torch.Generator,
    run: Run | Generate | None = None,
    *,
    keep: Callable[[dict[str, Any]], bool] | None = None,
    network: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> TrajectoryPoints:
    """The passes of the pipeline's transformer while it generates `number` samples, without gradient.

    All of them, or those whose arguments `keep` says yes to. `network` names the transformer of a pipeline with two.
    Raises ValueError for a pipeline with two of them and no name, if the one makes no pass, if passes cannot be
    stacked, and once what is kept exceeds `max_bytes`.
    """
    transformer = denoiser(pipe, network)
    signature = inspect.signature(type(transformer).forward)
    calls: list[tuple[dict[str, Any], tuple[Tensor, ...]]] = []
    held = 0

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal held
        given = dict(signature.bind(module, *args, **kwargs).arguments)
        given.pop("self")
        if keep is not None and not keep(given):
            return
        calls.append((given, outputs_of(output)))
        held += sum(x.nbytes for x in (*given.values(), *calls[-1][1]) if isinstance(x, Tensor))
        if held > max_bytes:
            raise ValueError(
                f"the passes of {number} samples do not fit into {max_bytes / 2**30:.1f} GiB: {len(calls)} of them are "
                f"{held / 2**30:.1f} GiB already. Take fewer samples, fewer steps or a smaller size"
            )

    handle = transformer.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), quiet(pipe):
            as_generate(run)(pipe, number, generator)
    finally:
        handle.remove()
    if not calls:
        raise ValueError(f"this {type(pipe).__name__} generated without a pass of its {network or 'transformer'}")
    return _stacked(calls)


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a transformer's output, whichever way it was asked to return them."""
    values = output if isinstance(output, tuple) else output.to_tuple()
    return tuple(value for value in values if isinstance(value, Tensor))


def points_at_once(points: TrajectoryPoints) -> int:
    """How many points go into one pass: 64 of a small model, fewer of one whose inputs are large."""
    given = [value for name, value in points.arguments.items() if name in points.rows]
    elements = sum(value[0].numel() for value in given if isinstance(value, Tensor))
    return max(1, min(PASS_POINTS, PASS_ELEMENTS // max(elements, 1)))


def velocity_error(transformer: nn.Module, points: TrajectoryPoints, batch_size: int | None = None) -> float:
    """Root mean square distance of a transformer's output from that of the points, relative to the latter's size.

    `batch_size` points go into a pass, `points_at_once` of them unless given.
    """
    batch_size = batch_size or points_at_once(points)
    with torch.no_grad():
        parts = [points[start : start + batch_size] for start in range(0, len(points), batch_size)]
        shares = [len(part) / len(points) * squared_error(transformer, part) for part in parts]
    return float(sum(shares).sqrt())


def squared_error(transformer: nn.Module, points: TrajectoryPoints) -> Float[Tensor, ""]:
    """|output - target|^2 / |target|^2, the mean over streams; has a gradient."""
    outputs = outputs_of(transformer(**points.arguments))
    squares = [
        (output.float() - target.float()).square().sum() / target.float().square().sum()
        for output, target in zip(outputs, points.outputs, strict=True)
    ]
    return torch.stack(squares).mean()


def _stacked(calls: list[tuple[dict[str, Any], tuple[Tensor, ...]]]) -> TrajectoryPoints:
    """One call in the place of many: rows one after the other."""
    first = calls[0][0]
    if not calls[0][1]:
        raise ValueError("this transformer answers with lists and not with tensors: its passes cannot be stacked")
    batch = len(calls[0][1][0])
    rows = frozenset(name for name, value in first.items() if _has_rows(value, batch))
    arguments = {}
    for name, value in first.items():
        given = [call.get(name) for call, _ in calls]
        if name in rows:
            if len({value.shape[1:] for value in given}) > 1:
                shapes = ", ".join(str(tuple(value.shape)) for value in given[:3])
                raise ValueError(f"passes differ in the shape of {name!r} ({shapes}, …): give prompts of one length")
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
