"""How the inputs of each layer spread at each time: what a fixed scale has to cope with.

A diffusion model is one network used as many: at t = 1 it looks at noise, near t = 0 at an almost finished sample, and
ranges of its activations drift on the way. A scale fixed by calibration serves all times at once, so where a layer's
range at its widest time is many times that of the others, static INT8 wastes bits at those. The record shows it:

    record = record_ranges(pipe)
    layer = record.layers["transformer_blocks.0.ff.linear_out"]
    plot(layer.times, layer.largest);  plot(layer.times, layer.percentiles)      a line for each of record.levels

Smallest and largest are exact. Percentiles are those of `SAMPLES` values of each pass, drawn at random: taking every
n-th would take the same channels each time. All batches and both guidance branches of a time are taken together, as
calibration does.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.datasets.writing import read_json, write_json
from diffusion_opt.quantization.policy import choose
from diffusion_opt.quantization.simulation.calibration import (
    run_or_classes,
    run_trajectories,
    samples_timesteps,
    timestep_scale,
)
from diffusion_opt.subjects import Run, denoisers

LEVELS = (0.1, 1.0, 50.0, 99.0, 99.9)  # percent
SAMPLES = 1024  # values kept of each pass through a layer


@dataclass(frozen=True, slots=True)
class LayerRanges:
    """Inputs of one layer at falling times in [0, 1]; one entry for each time."""

    times: tuple[float, ...]
    smallest: tuple[float, ...]
    largest: tuple[float, ...]
    percentiles: tuple[tuple[float, ...], ...]  # of each time, one for each level of the record

    @property
    def sizes(self) -> tuple[float, ...]:
        """The largest |x| of each time: what a range would be that knew the time."""
        return tuple(max(-low, high) for low, high in zip(self.smallest, self.largest, strict=True))

    @property
    def drift(self) -> float:
        """The widest time's size over the narrowest's: 1 if time does not matter."""
        return max(self.sizes) / max(min(self.sizes), 1e-30)


@dataclass(frozen=True, slots=True)
class RangeRecord:
    """Ranges of inputs by layer; `levels` are the percentages of the percentiles."""

    layers: dict[str, LayerRanges]
    levels: tuple[float, ...] = LEVELS

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "RangeRecord":
        """Read what `save` wrote."""
        stored = read_json(path, "record the ranges again")
        layers = {
            name: LayerRanges(
                *(tuple(layer[key]) for key in ("times", "smallest", "largest")),
                tuple(tuple(row) for row in layer["percentiles"]),
            )
            for name, layer in stored["layers"].items()
        }
        return cls(layers, tuple(stored["levels"]))


@torch.no_grad()
def record_ranges(
    pipe: DiffusionPipeline,
    names: Sequence[str] | None = None,
    run: Run | None = None,
    samples: int = 20,
    progress: bool = False,
) -> RangeRecord:
    """Run the pipeline as calibration does and record what enters its layers; the pipeline is left as it was.

    `names` None takes the layers that the family's policy quantizes, `run` None all classes. Raises ValueError for a
    pipeline with two transformers, a name that is no layer, and a layer that no pass went through.
    """
    networks = denoisers(pipe)
    if len(networks) > 1:
        raise ValueError(f"this {type(pipe).__name__} has two transformers: ranges are recorded of one")
    (transformer,) = networks.values()
    chosen = [c.name for c in choose(transformer) if c.quantized] if names is None else list(names)
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in chosen if name not in linears]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no linear layer; their names are like {', '.join(sorted(linears)[-3:])}")
    seen, asked = _Seen(), run_or_classes(pipe, run, samples)
    with seen.watching(transformer, chosen):
        run_trajectories(pipe, asked, samples, progress)
    unused = [name for name in chosen if name not in seen.passes]
    if unused:
        raise ValueError(f"no pass went through {unused[0]}: is this layer used at all?")
    scale = timestep_scale(pipe, max(time for passes in seen.passes.values() for time in passes))
    return RangeRecord({name: seen.ranges(name, scale) for name in chosen})


@dataclass(slots=True)
class _AtOneTime:
    smallest: float = float("inf")
    largest: float = float("-inf")
    sample: list[Tensor] = field(default_factory=list)


class _Seen:
    """What hooks saw: the timestep of the pass under way, and inputs of layers by name and timestep."""

    def __init__(self) -> None:
        self.passes: dict[str, dict[float, _AtOneTime]] = {}
        self._time = 1.0
        self._generator = torch.Generator().manual_seed(0)

    @contextlib.contextmanager
    def watching(self, transformer: nn.Module, names: Sequence[str]) -> Iterator[None]:
        handles = [transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        handles += [transformer.get_submodule(name).register_forward_pre_hook(self._layer(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ranges(self, name: str, scale: int) -> LayerRanges:
        passes = self.passes[name]
        times = tuple(sorted(passes, reverse=True))
        levels = torch.tensor(LEVELS, dtype=torch.float32) / 100
        rows = tuple(tuple(torch.cat(passes[time].sample).quantile(levels).tolist()) for time in times)
        smallest, largest = (tuple(getattr(passes[t], end) for t in times) for end in ("smallest", "largest"))
        return LayerRanges(tuple(time / scale for time in times), smallest, largest, rows)

    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = inspect.signature(type(transformer).forward).bind(transformer, *args, **kwargs).arguments
        timesteps = samples_timesteps(call["timestep"])
        if not bool((timesteps == timesteps[0]).all()):
            raise ValueError("samples of one pass are at different times: ranges cannot be told apart by time")
        self._time = float(timesteps[0])

    def _layer(self, name: str):
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float().flatten()
            at = self.passes.setdefault(name, {}).setdefault(self._time, _AtOneTime())
            at.smallest, at.largest = min(at.smallest, float(x.min())), max(at.largest, float(x.max()))
            if len(x) > SAMPLES:
                x = x[torch.randint(len(x), (SAMPLES,), generator=self._generator).to(x.device)]
            at.sample.append(x.cpu())

        return hook
