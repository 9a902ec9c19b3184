"""Which format for which layer: the least error that a size allows, beside one format for all at the same size.

    minimize  sum_l e(l, f_l)^2      subject to      sum_l s(l, f_l) <= B

with e from a sensitivity table and s the bits of the weights, or the bit operations. This is a knapsack with one choice
a layer, and it is solved exactly: layer after layer, keep the best error for each total size that can occur, and drop
what is larger and worse than another (dynamic programming over the Pareto front). Layers of a transformer have few
shapes, so few totals occur and the front stays small; one pass gives the best choice for every budget at once
(`frontier`). No solver is needed; modelopt's `auto_quantize` brings one (PuLP) and approximates the scores instead.

The sum is a prediction: it takes errors of different layers to be uncorrelated. `compare_with_uniform` measures what
really comes out, for the mixture and for one format everywhere, at the same number of bytes.

    table = sensitivity(pipe, probe, ("nvfp4", "int8"))
    PTQ(layers=allocate(table, bits_per_weight=6).layers).apply(pipe)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusion_opt.models.fingerprint import identity
from diffusion_opt.quantization.mixed.sensitivity import FLOAT, LayerSensitivity, Probe, SensitivityTable, joint_error
from diffusion_opt.quantization.mixed.trajectory_points import only_denoiser

Measure = Literal["weight_bits", "bit_operations"]
MEASURES: dict[Measure, Callable[[LayerSensitivity, str], int]] = {
    "weight_bits": LayerSensitivity.weight_bits,
    "bit_operations": LayerSensitivity.bit_operations,
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """A format for each layer of a table, what that costs, and the error predicted from the table."""

    formats: dict[str, str]  # by layer name; "float" for layers that stay as they are
    weight_bits: int
    bit_operations: int
    num_weights: int
    predicted_error: float

    @property
    def layers(self) -> dict[str, str]:
        """The layers that are quantized: what `PTQ(layers=…)` takes."""
        return {name: format for name, format in self.formats.items() if format != FLOAT}

    @property
    def weight_bytes(self) -> int:
        return -(-self.weight_bits // 8)

    @property
    def bits_per_weight(self) -> float:
        return self.weight_bits / self.num_weights

    def __str__(self) -> str:
        counts = {format: list(self.formats.values()).count(format) for format in dict.fromkeys(self.formats.values())}
        mixture = ", ".join(f"{number} in {format}" for format, number in counts.items())
        return (
            f"{mixture}: {self.bits_per_weight:.2f} bits per weight, {self.weight_bytes:,} bytes, "
            f"predicted error {self.predicted_error:.4f}"
        )


@dataclass(frozen=True, slots=True)
class Contest:
    """One format for all layers and the mixture that is no larger, with errors as they were measured."""

    uniform: Allocation
    mixed: Allocation
    uniform_error: float
    mixed_error: float

    def __str__(self) -> str:
        (format,) = set(self.uniform.formats.values())
        return (
            f"{format} everywhere: {self.uniform.bits_per_weight:.2f} bits, error {self.uniform_error:.4f}; mixed: "
            f"{self.mixed.bits_per_weight:.2f} bits, error {self.mixed_error:.4f}, "
            f"predicted {self.mixed.predicted_error:.4f}"
        )


def uniform(table: SensitivityTable, format: str) -> Allocation:
    """The same format for all layers. Raises ValueError for a format that the table does not have."""
    return _allocation(table, [_known(table, (format,))[0]] * len(table.layers))


def allocate(
    table: SensitivityTable,
    *,
    bits_per_weight: float | None = None,
    max_bytes: int | None = None,
    max_bit_operations: int | None = None,
    formats: Sequence[str] | None = None,
    keep_float: bool = True,
) -> Allocation:
    """The formats with the least predicted error within one budget: average bits, bytes of weights, or bit operations.

    `formats` restricts the choice to some of the table's; with `keep_float` a layer may also stay as it is. Raises
    ValueError unless exactly one budget is given, and for a budget that even the smallest formats exceed.
    """
    budgets = {"bits_per_weight": bits_per_weight, "max_bytes": max_bytes, "max_bit_operations": max_bit_operations}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(budgets)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    measure: Measure = "bit_operations" if name == "max_bit_operations" else "weight_bits"
    weights = sum(layer.num_weights for layer in table.layers)
    unit = {"bits_per_weight": weights, "max_bytes": 8, "max_bit_operations": 1}[name]
    front = _front(table, _options(table, formats, keep_float), measure)
    fitting = [index for index, size in enumerate(front.sizes) if size <= value * unit]
    if not fitting:
        raise ValueError(f"{name}={value:g} is too little: the smallest choice needs {front.sizes[0] / unit:.9g}")
    return _allocation(table, front.choices(fitting[-1]))


def frontier(
    table: SensitivityTable,
    formats: Sequence[str] | None = None,
    keep_float: bool = True,
    measure: Measure = "weight_bits",
) -> tuple[Allocation, ...]:
    """Every choice that no other beats in both size and predicted error, the smallest first."""
    front = _front(table, _options(table, formats, keep_float), measure)
    return tuple(_allocation(table, front.choices(index)) for index in range(len(front.sizes)))


def compare_with_uniform(
    pipe: DiffusionPipeline,
    table: SensitivityTable,
    probe: Probe,
    at: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
) -> tuple[Contest, ...]:
    """For each format of `at` (default: all of the table) the best mixture of at most its size, both measured together.

    Take a probe that the table was not made from. The mixture may use `formats` (default: all of the table) and float.
    Raises ValueError for a table of another model.
    """
    if (found := identity(only_denoiser(pipe)).model) != table.model:
        raise ValueError(f"this table is of model {table.model}, the pipeline holds {found}: measure it again")
    contests = []
    for format in _known(table, at):
        plain = uniform(table, format)
        mixed = allocate(table, max_bytes=plain.weight_bytes, formats=formats)
        plain_error = joint_error(pipe.transformer, plain.formats, probe)
        same = mixed.formats == plain.formats
        mixed_error = plain_error if same else joint_error(pipe.transformer, mixed.formats, probe)
        contests.append(Contest(plain, mixed, plain_error, mixed_error))
    return tuple(contests)


@dataclass(frozen=True, slots=True)
class _Front:
    """Totals that nothing beats, by rising size, and for each layer the choice and the state before it."""

    sizes: list[int]
    options: tuple[str, ...]
    steps: list[tuple[Tensor, Tensor]]  # of each layer: (option, index in the front before) of each state

    def choices(self, index: int) -> list[str]:
        """The format of each layer in a state of the last front."""
        found = []
        for option, before in reversed(self.steps):
            found.append(self.options[int(option[index])])
            index = int(before[index])
        return found[::-1]


def _front(table: SensitivityTable, options: tuple[str, ...], measure: Measure) -> _Front:
    """Add layer after layer, and after each keep only states that no other beats in both size and squared error."""
    sizes, losses = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps = []
    for layer in table.layers:
        size = torch.tensor([MEASURES[measure](layer, option) for option in options])
        loss = torch.tensor([layer.error(option) ** 2 for option in options], dtype=torch.float64)
        totals, sums = (sizes + size[:, None]).flatten(), (losses + loss[:, None]).flatten()
        by_loss = sums.argsort(stable=True)
        order = by_loss[totals[by_loss].argsort(stable=True)]  # by size, at equal size by error
        best = sums[order].cummin(0).values
        kept = order[torch.cat([torch.tensor([True]), best[1:] < best[:-1]])]
        steps.append((kept // len(sizes), kept % len(sizes)))
        sizes, losses = totals[kept], sums[kept]
    return _Front(sizes.tolist(), options, steps)


def _options(table: SensitivityTable, formats: Sequence[str] | None, keep_float: bool) -> tuple[str, ...]:
    return (*_known(table, formats), *((FLOAT,) if keep_float else ()))


def _known(table: SensitivityTable, formats: Sequence[str] | None) -> tuple[str, ...]:
    """These formats, or all. Raises ValueError for one that the table does not have, or for none."""
    wanted = table.formats if formats is None else tuple(formats)
    for format in wanted:
        if format not in table.formats:
            raise ValueError(f"the table has {', '.join(table.formats)}, not {format!r}: measure it first")
    if not wanted:
        raise ValueError(f"no format to choose from; the table has {', '.join(table.formats)}")
    return wanted


def _allocation(table: SensitivityTable, choices: Sequence[str]) -> Allocation:
    chosen = list(zip(table.layers, choices, strict=True))
    return Allocation(
        {name: format for layer, format in chosen for name in layer.layers},
        sum(layer.weight_bits(format) for layer, format in chosen),
        sum(layer.bit_operations(format) for layer, format in chosen),
        sum(layer.num_weights for layer in table.layers),
        table.predicted({layer.name: format for layer, format in chosen}),
    )
