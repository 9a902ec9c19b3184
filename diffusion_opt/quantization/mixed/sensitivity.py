"""How much each layer minds being rounded: one layer at a time, at several times of the float network's own runs.

    e(l, f, t) = |v_l,f(x_t, t, c) - v(x_t, t, c)| / |v(x_t, t, c)|        layer l in format f, all others in float

The passes are recorded once (`record_probe`); a format is put on a copy of the transformer, calibrated on those passes,
and its layers are moved one by one into a float copy, so an entry costs one pass over the probe and the pipeline is
never touched. The layers are those of `PTQ`, so the table speaks of exactly what `PTQ(layers=…)` does.

Rounding errors of different layers are nearly uncorrelated, and then their squares add (`predicted`):

    e(all)^2  ~  sum_l e(l)^2

which is what lets `allocation.py` choose formats layer by layer. How well it holds is measured there, not assumed.

modelopt's `auto_quantize` scores layers by the gradient of a loss or by the divergence of a softmax over output
channels. A teacher has no gradient at its own output, channels of a velocity are no probabilities, and neither knows of
time; this is the error itself.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from diffusion_opt.datasets.writing import read_json, write_json
from diffusion_opt.models.fingerprint import identity
from diffusion_opt.quantization.formats import Format, format_named
from diffusion_opt.quantization.mixed.trajectory_points import (
    MAX_BYTES,
    Generate,
    TrajectoryPoints,
    as_generate,
    denoiser,
    only_denoiser,
    points_at_once,
    trajectory_points,
    velocity_error,
)
from diffusion_opt.quantization.policy import choose
from diffusion_opt.quantization.simulation.calibration import quiet, samples_timesteps, timestep_scale
from diffusion_opt.quantization.simulation.simulate import simulate
from diffusion_opt.subjects import Run, denoisers

Probe = Mapping[float, TrajectoryPoints]  # passes of the float network at each of some times in [0, 1], falling
FLOAT = "float"  # the name of no format: the layer as it is
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One layer, or a group that gets the same format: what it costs and what its rounding does to the velocity."""

    name: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # (outputs, inputs) of each
    macs: int  # multiply-accumulates of a pass of one sample
    errors: dict[str, tuple[float, ...]]  # by format, relative, one for each time of the table

    def error(self, format: str) -> float:
        """Root mean square over times; 0 for a layer that stays in float."""
        errors = self.errors.get(format, ()) if format != FLOAT else (0.0,)
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    @property
    def num_weights(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.shapes)

    def weight_bits(self, format: str) -> int:
        """Bits of all weights with their scales."""
        if format == FLOAT:
            return FLOAT_BITS * self.num_weights
        return sum(format_named(format).weight_bits(outputs, inputs) for outputs, inputs in self.shapes)

    def bit_operations(self, format: str) -> int:
        """MACs times the bits of both factors, the usual measure of arithmetic in mixed precision."""
        if format == FLOAT:
            return self.macs * FLOAT_BITS**2
        numbers = format_named(format)
        return self.macs * numbers.weight.bits * (FLOAT_BITS if numbers.input is None else numbers.input.bits)


@dataclass(frozen=True, slots=True)
class SensitivityTable:
    """The sensitivity of every layer in every format, of the model with this fingerprint."""

    model: str
    formats: tuple[str, ...]
    times: tuple[float, ...]  # falling, in [0, 1]
    num_points: int  # passes of single samples behind each error, all times together
    layers: tuple[LayerSensitivity, ...]

    def predicted(self, formats: Mapping[str, str]) -> float:
        """The error of the model if each entry has its format and errors of entries are uncorrelated."""
        return math.sqrt(sum(layer.error(formats[layer.name]) ** 2 for layer in self.layers))

    def dominant(self, format: str, share: float = 0.5) -> tuple[str, ...]:
        """The fewest entries that together carry this share of the squared error, the worst first."""
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self._check(format)
        ranked = sorted(self.layers, key=lambda layer: -layer.error(format))
        wanted = share * sum(layer.error(format) ** 2 for layer in ranked) * (1 - 1e-9)
        found, carried = [], 0.0
        for layer in ranked:
            if carried >= wanted:
                break
            found.append(layer.name)
            carried += layer.error(format) ** 2
        return tuple(found)

    def _check(self, format: str) -> None:
        if format not in self.formats:
            raise ValueError(f"this table has {', '.join(self.formats)}, not {format!r}: measure it too")

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self), indent=1)

    @classmethod
    def load(cls, path: Path) -> "SensitivityTable":
        """Read what `save` wrote. Raises ValueError for anything else."""
        stored = read_json(path, "measure the table again")
        for owner, entry in ((cls, stored), *((LayerSensitivity, layer) for layer in stored.get("layers", ()))):
            names = {field.name for field in fields(owner)}
            if set(entry) != names:
                raise ValueError(f"{path} is no sensitivity table: {owner.__name__} has exactly {sorted(names)}")
        layers = tuple(
            LayerSensitivity(
                layer["name"],
                tuple(layer["layers"]),
                tuple((outputs, inputs) for outputs, inputs in layer["shapes"]),
                layer["macs"],
                {format: tuple(errors) for format, errors in layer["errors"].items()},
            )
            for layer in stored["layers"]
        )
        return cls(stored["model"], tuple(stored["formats"]), tuple(stored["times"]), stored["num_points"], layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'relative error, one at a time':<{width}}" + "".join(f"{name:>18}" for name in self.formats)]
        for layer in self.layers:
            lines.append(f"{layer.name:<{width}}" + "".join(f"{layer.error(name):18.5f}" for name in self.formats))
        totals = (self.predicted(dict.fromkeys((one.name for one in self.layers), name)) for name in self.formats)
        lines.append(f"{'all, if squares add':<{width}}" + "".join(f"{total:18.5f}" for total in totals))
        for name in self.formats:
            lines.append(f"half of the squared error in {name}: {', '.join(self.dominant(name))}")
        return "\n".join(lines)


def record_probe(
    pipe: DiffusionPipeline,
    num_samples: int,
    generator: torch.Generator,
    num_times: int = 5,
    run: Run | Generate | None = None,
    *,
    network: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[float, TrajectoryPoints]:
    """Passes of the float network while it generates: `num_times` of the times it visits, evenly spaced, both ends.

    A first sample tells which times are visited, so that of the others only the chosen passes are ever held. `network`
    names the transformer of a pipeline that has two, each with times of its own. Raises
    ValueError for counts below 1, for a transformer that is not told the time of each sample, and once the probe would
    be larger than `max_bytes`.
    """
    if num_samples < 1 or num_times < 1:
        raise ValueError(f"num_samples and num_times must be 1 or more, got {num_samples} and {num_times}")
    visited, largest = _visited(pipe, run, network)
    picked = visited[torch.linspace(0, len(visited) - 1, min(num_times, len(visited))).round().long()]

    def keep(given: Mapping[str, Any]) -> bool:
        return bool(torch.isin(samples_timesteps(given["timestep"]), picked).any())

    points = trajectory_points(pipe, num_samples, generator, run, keep=keep, network=network, max_bytes=max_bytes)
    if "timestep" not in points.rows:
        raise ValueError(f"{type(denoiser(pipe, network)).__name__} is not given a timestep for each sample")
    timesteps = samples_timesteps(points.arguments["timestep"])
    scale = timestep_scale(pipe, largest)
    return {float(one.double() / scale): points[timesteps == one] for one in picked}


def _visited(pipe: DiffusionPipeline, run: Run | Generate | None, network: str | None) -> tuple[Tensor, float]:
    """The timesteps at which a network computes while one sample is made, falling, and the largest of all networks."""
    chosen, seen = denoiser(pipe, network), {}

    def watch(transformer: nn.Module) -> RemovableHandle:
        signature = inspect.signature(type(transformer).forward)

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            timestep = signature.bind(module, *args, **kwargs).arguments.get("timestep")
            if not isinstance(timestep, Tensor):
                raise ValueError(f"{type(transformer).__name__} is not given a timestep for each sample")
            seen.setdefault(module, []).append(samples_timesteps(timestep))

        return transformer.register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(transformer) for transformer in denoisers(pipe).values()]
    try:
        with torch.no_grad(), quiet(pipe):
            as_generate(run)(pipe, 1, torch.Generator(pipe.device).manual_seed(0))
    finally:
        for handle in handles:
            handle.remove()
    if chosen not in seen:
        raise ValueError(
            f"this {type(pipe).__name__} generated without a pass of its {network or 'transformer'}"
            + ("" if network is None else ": take more steps, so that each network has some")
        )
    return torch.cat(seen[chosen]).unique().flip(0), float(max(one.max() for ones in seen.values() for one in ones))


def errors_by_time(transformer: nn.Module, probe: Probe) -> tuple[float, ...]:
    """Relative error of a transformer's velocity at each time of the probe."""
    return tuple(velocity_error(transformer, points) for points in probe.values())


def joint_error(transformer: nn.Module, formats: Mapping[str, str], probe: Probe) -> float:
    """The error with all these layers in their formats at once (`float` ones as they are), root mean square over times.

    The transformer itself is left alone.
    """
    chosen = {name: format_named(format) for name, format in formats.items() if format != FLOAT}
    if not chosen:
        return 0.0
    errors = errors_by_time(_simulated_copy(transformer, chosen, probe), probe)
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


@torch.no_grad()
def sensitivity(
    pipe: DiffusionPipeline,
    probe: Probe,
    formats: Sequence[str] = ("int8", "nvfp4"),
    groups: Mapping[str, Sequence[str]] | None = None,
    progress: bool = False,
) -> SensitivityTable:
    """Measure every layer the policy quantizes, or every group of layers, in every format.

    `groups` names sets of layers that are to have one format, such as a block; None puts each layer on its own. The
    pipeline is left alone. Raises ValueError for unknown formats or layers, and what `simulate` raises.
    """
    transformer = only_denoiser(pipe)
    if groups is None:
        groups = {choice.name: (choice.name,) for choice in choose(transformer) if choice.quantized}
    every = [name for names in groups.values() for name in names]
    if not every or len(set(every)) < len(every):
        raise ValueError(f"groups must hold layers, each of them once, got {len(every)} with {len(set(every))} names")
    floats = copy.deepcopy(transformer)
    errors: dict[str, dict[str, tuple[float, ...]]] = {name: {} for name in groups}
    with tqdm(total=len(groups) * len(formats), desc="sensitivity", disable=not progress) as bar:
        for format in formats:
            rounded = _simulated_copy(transformer, dict.fromkeys(every, format_named(format)), probe)
            for group, names in groups.items():
                bar.set_postfix_str(f"{group} {format}")
                errors[group][format] = _swapped_error(floats, rounded, names, probe)
                bar.update()
    macs = _macs(floats, every, probe)
    found = tuple(
        LayerSensitivity(
            group,
            tuple(names),
            tuple(tuple(floats.get_submodule(name).weight.shape) for name in names),
            sum(macs[name] for name in names),
            errors[group],
        )
        for group, names in groups.items()
    )
    num_points = sum(len(points) for points in probe.values())
    return SensitivityTable(identity(transformer).model, tuple(formats), tuple(probe), num_points, found)


def _simulated_copy(transformer: nn.Module, layers: Mapping[str, Format], probe: Probe) -> nn.Module:
    """A copy with these layers quantized in simulation, calibrated on the probe."""
    rounded = copy.deepcopy(transformer)
    simulate(rounded, layers, lambda: _run(rounded, probe))
    return rounded


def _run(transformer: nn.Module, probe: Probe) -> None:
    for points in probe.values():
        size = points_at_once(points)
        for start in range(0, len(points), size):
            transformer(**points[start : start + size].arguments)


def _swapped_error(floats: nn.Module, rounded: nn.Module, names: Sequence[str], probe: Probe) -> tuple[float, ...]:
    """The errors by time of the float network with these layers taken from the rounded one."""
    own = {name: floats.get_submodule(name) for name in names}
    for name in names:
        floats.set_submodule(name, rounded.get_submodule(name))
    try:
        return errors_by_time(floats, probe)
    finally:
        for name, layer in own.items():
            floats.set_submodule(name, layer)


def _macs(transformer: nn.Module, names: Sequence[str], probe: Probe) -> dict[str, int]:
    """Multiply-accumulates of each layer in a pass of one sample."""
    points = next(iter(probe.values()))[:1]
    counted = dict.fromkeys(names, 0)

    def hook(name: str):
        def count(layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
            counted[name] += args[0].numel() * layer.out_features

        return count

    handles = [transformer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        transformer(**points.arguments)
    finally:
        for handle in handles:
            handle.remove()
    return counted
