"""Which gains multiply, which cancel: techniques alone, in pairs and all together, measured in one run.

Of factors A and B with gains g (times less arithmetic, times faster) and losses l (`search.goal.loss`)

    predicted   g_A g_B      l_A + l_B        as if one did not know of the other
    found       g_AB         l_AB

and the interaction is found over predicted: 1 they multiply, below 1 they cancel (both skip the same passes), above 1
they help each other. Arithmetic is counted and has no error; a time has that of its median (McGill et al. 1978: 1.57
interquartile ranges over the root of the turns), a loss the bootstrap interval of its judge. A pair whose techniques
refuse one another is told with the reason, not left out.

Whether a cache must be calibrated anew on a quantized network is such an interaction: the error of few bits can be as
large as the change from step to step that a cache looks at. `recalibrated` measures it both ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from diffusion_opt.caching import StepTable, calibrate_step_cache
from diffusion_opt.evaluation import Measurement, measure_together
from diffusion_opt.evaluation.judges.judge import Number
from diffusion_opt.recipes.measuring import as_rung, run_under
from diffusion_opt.recipes.recipe import Recipe, Technique, kind_of
from diffusion_opt.recipes.search.goal import loss
from diffusion_opt.recipes.search.verdict import with_own_networks
from diffusion_opt.subjects import Run, denoisers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHER, ALL = "as it comes", "all"
NOTCH = 1.57


@dataclass(frozen=True, slots=True)
class Effect:
    """What a set of factors does: gains and losses, each with an interval (low, high)."""

    factors: tuple[str, ...]
    macs: float  # times less arithmetic
    time: tuple[float, float, float]  # times faster: value, low, high
    losses: dict[str, tuple[float, float, float]]  # by the judge's number: value, low, high
    refused: str = ""  # why the factors do not go together


@dataclass(frozen=True, slots=True)
class Interaction:
    """Two or more factors: product predicted, product found."""

    effect: Effect
    macs_predicted: float
    time_predicted: float
    losses_predicted: dict[str, float]

    @property
    def macs(self) -> float:
        """Arithmetic: found over predicted."""
        return self.effect.macs / self.macs_predicted

    @property
    def time(self) -> tuple[float, float, float]:
        """Time: found over predicted, with the interval of what was found."""
        return tuple(value / self.time_predicted for value in self.effect.time)


def combined(factors: Mapping[str, Technique]) -> tuple[dict[tuple[str, ...], Recipe], dict[tuple[str, ...], str]]:
    """Recipes of single factors, pairs and all, by names; and of those that do not go together, why."""
    recipes: dict[tuple[str, ...], Recipe] = {}
    refused: dict[tuple[str, ...], str] = {}
    sizes = [1, 2] + ([len(factors)] if len(factors) > 2 else [])
    for names in (names for size in sizes for names in combinations(factors, size)):
        ordered = sorted((factors[name] for name in names), key=lambda technique: kind_of(technique).place)
        try:
            recipes[names] = Recipe(tuple(ordered))
        except ValueError as error:
            refused[names] = str(error)
    return recipes, refused


def study(
    pipe: DiffusionPipeline,
    factors: Mapping[str, Technique],
    run: Run,
    numbers: Sequence[str],
    *,
    samples: int,
    rounds: int = 5,
    real: str | None = None,
    progress: bool = True,
) -> list[Effect]:
    """Measure every single factor, every pair and all of them beside the pipeline, in turns.

    `numbers` are those of judges ("fashion.distance", "imagenet.distance"). Raises ValueError for fewer than two
    factors and if one alone refuses the pipeline.
    """
    if len(factors) < 2:
        raise ValueError(f"an interaction takes two factors or more, got {len(factors)}")
    recipes, refused = combined(factors)
    pipes = {(TEACHER,): pipe}
    for names, recipe in recipes.items():
        try:
            pipes[names] = recipe.apply(with_own_networks(pipe))
        except ValueError as error:
            if len(names) == 1:
                raise
            refused[names] = str(error)
    found = measure_together(
        {" + ".join(names): as_rung(one, run_under(one, run)) for names, one in pipes.items()},
        num_samples=samples, batch_size=run.batch_size, prompts=run.prompts, rounds=rounds, seed=run.seed, real=real,
        device=next(next(iter(denoisers(pipe).values())).parameters()).device.type, progress=progress,
        judges=tuple(dict.fromkeys(name.partition(".")[0] for name in numbers)),
    )  # fmt: skip
    teacher = found[TEACHER]
    effects = [effect(names, found[" + ".join(names)], teacher, numbers) for names in pipes]
    nothing = (1.0, 1.0, 1.0)
    return effects + [Effect(names, 1.0, nothing, {}, reason) for names, reason in refused.items()]


def effect(names: tuple[str, ...], one: Measurement, teacher: Measurement, numbers: Sequence[str]) -> Effect:
    """Gains and losses of one measurement against the teacher's."""
    ratio = teacher.latency_s / one.latency_s
    spread = NOTCH * sqrt(
        (one.latency_iqr_s / one.latency_s) ** 2 + (teacher.latency_iqr_s / teacher.latency_s) ** 2
    ) / sqrt(one.protocol.rounds)  # fmt: skip
    losses = {name: _losses(name, one.judged[name], teacher.judged.get(name)) for name in numbers if name in one.judged}
    return Effect(names, teacher.macs / one.macs, (ratio, ratio * (1 - spread), ratio * (1 + spread)), losses)


def _losses(name: str, number: Number, teacher: Number | None) -> tuple[float, float, float]:
    """A loss and its interval, the teacher's number taken as exact."""
    values = [number.value, number.value if number.low is None else number.low]
    values.append(number.value if number.high is None else number.high)
    return tuple(loss(name, Number(value, number.num, number.basis), teacher) for value in values)


def interactions(effects: Sequence[Effect]) -> list[Interaction]:
    """Of every pair and of all: what the single effects predict beside what was found."""
    single = {one.factors[0]: one for one in effects if len(one.factors) == 1}
    found = []
    for one in effects:
        if len(one.factors) < 2 or one.refused:
            continue
        parts = [single[name] for name in one.factors]
        predicted = {name: sum(part.losses[name][0] for part in parts) for name in one.losses}
        found.append(
            Interaction(one, prod(part.macs for part in parts), prod(part.time[0] for part in parts), predicted)
        )
    return found


def recalibrated(
    pipe: DiffusionPipeline, stored: Technique, run: Run, budget: float, folder: Path
) -> dict[str, Recipe]:
    """The same table cache over a quantized network, calibrated before it was quantized and after.

    `budget` is the accumulated change at which the cache computes. The calibrations are written to the folder.
    """
    recipes = {}
    for name, technique in (("calibrated before", None), ("calibrated after", stored)):
        one = with_own_networks(pipe)
        if technique is not None:
            technique.apply(one)
        path = folder / f"{name.replace(' ', '-')}.json"
        calibrate_step_cache(one, run).save(path)
        recipes[name] = Recipe((stored, StepTable(budget, str(path))))
    return recipes


def table(effects: Sequence[Effect]) -> list[str]:
    """Singles, then pairs: predicted, found, found over predicted, with intervals."""
    said = ["alone: times less arithmetic, times faster, losses"]
    for one in (one for one in effects if len(one.factors) == 1):
        said.append(f"  {one.factors[0]:24s} {one.macs:6.2f}x {_spread(one.time, '.2f')}x  {_lost(one.losses)}")
    said.append("together: predicted -> found (found over predicted)")
    for one in interactions(effects):
        name = " + ".join(one.effect.factors)
        said += [
            f"  {name}",
            f"    arithmetic {one.macs_predicted:.2f}x -> {one.effect.macs:.2f}x ({one.macs:.2f})",
            f"    time {one.time_predicted:.2f}x -> {_spread(one.effect.time, '.2f')}x ({_spread(one.time, '.2f')})",
            *(
                f"    loss, {judge}: {one.losses_predicted[judge]:+.3f} -> {_spread(value, '+.3f')}"
                for judge, value in one.effect.losses.items()
            ),
        ]
    said += [f"  {' + '.join(one.factors)}: refused, {one.refused}" for one in effects if one.refused]
    return said


def _spread(value: tuple[float, float, float], form: str) -> str:
    return f"{value[0]:{form}} [{value[1]:{form}}, {value[2]:{form}}]"


def _lost(losses: Mapping[str, tuple[float, float, float]]) -> str:
    return ", ".join(f"{name} {_spread(value, '+.3f')}" for name, value in losses.items())


def figure(effects: Sequence[Effect]) -> "Figure":
    """Heat maps of found over predicted: arithmetic, and time. White is 1, blue helps, red cancels."""
    import numpy as np
    from matplotlib.figure import Figure

    names = [one.factors[0] for one in effects if len(one.factors) == 1 and one.factors[0] != TEACHER]
    page = Figure(figsize=(11, 5), layout="constrained")
    pairs = [one for one in interactions(effects) if len(one.effect.factors) == 2]
    for axis, title in zip(page.subplots(1, 2), ("arithmetic", "time"), strict=True):
        grid = np.full((len(names), len(names)), np.nan)
        for one in pairs:
            row, column = (names.index(name) for name in one.effect.factors)
            grid[column, row] = one.macs if title == "arithmetic" else one.time[0]
            axis.text(row, column, f"{grid[column, row]:.2f}", ha="center", va="center", fontsize=9)
        axis.imshow(grid, cmap="RdBu", vmin=0.5, vmax=1.5)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{title}: found over predicted", fontsize=10)
    return page


def as_dict(effects: Sequence[Effect]) -> dict[str, Any]:
    """Plain data."""
    pairs = [
        {**asdict(one), "macs_found_over_predicted": one.macs, "time_found_over_predicted": one.time}
        for one in interactions(effects)
    ]
    return {"effects": [asdict(one) for one in effects], "interactions": pairs}
