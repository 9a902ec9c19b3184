"""The joint space of recipes that apply to one pipeline: what each part of a recipe may be.

    network     the pipeline's own, or a student          (of few steps: no solver, guidance or cache goes with it)
    steps       of which solver, how many
    weights     as they are, bfloat16, 8-bit layers
    attention   as it is, or in 8 bits                      (on a GPU, where a kernel makes it faster)
    cache       none, or a rule with its threshold
    guidance    whole, an interval of times, or every n-th step

Every choice is tried on the pipeline first, and taken off again. What refuses is no part of the space, and the reason
is kept. A point of the space is a plain dict of names and numbers, which a study stores; `recipe` turns it into a
`Recipe`. Techniques that have to be trained, calibrated or compiled first are not searched: QAT, PTQ, `StepTable`,
`Compile`. They are put on what the search found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from diffusion_opt.caching import EasyCache, FirstBlockCache, FixedInterval, GuidanceCache, TeaCache
from diffusion_opt.caching.comparison.contest import steps_of
from diffusion_opt.quantization import W8A8, Bfloat16, DynamicInt8, LowPrecisionAttention
from diffusion_opt.recipes.recipe import Recipe, Technique
from diffusion_opt.recipes.sampling import SOLVERS, Solver, Student
from diffusion_opt.subjects import Run, denoisers

if TYPE_CHECKING:
    from optuna.trial import Trial

OWN, NONE = "own", "none"
SHARES = (1.0, 0.72, 0.5, 0.36, 0.24, 0.16, 0.12, 0.08)  # of the pipeline's steps
FEW_STEPS = 4  # a cache that skips one of so few steps skips a quarter of the path at once
INTERVALS = {"interval 0.2-0.9": (0.2, 0.9), "interval 0.3-0.9": (0.3, 0.9), "interval 0.3-0.8": (0.3, 0.8)}
Point = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Space:
    """The choices of each part, the first being the pipeline as it comes, and what was refused and why."""

    own_steps: int
    networks: tuple[str, ...] = (OWN,)
    solvers: tuple[str, ...] = (OWN,)
    steps: tuple[int, ...] = ()
    weights: tuple[str, ...] = (NONE,)
    attention: tuple[str, ...] = (NONE,)
    caches: tuple[str, ...] = (NONE,)
    guidance: tuple[str, ...] = (NONE,)
    refused: Mapping[str, str] = field(default_factory=dict)  # technique -> why

    @classmethod
    def of(cls, pipe: DiffusionPipeline, run: Run, students: Sequence[str] = ()) -> "Space":
        """The space of a pipeline, found by trying. Raises ValueError for one with nothing to denoise."""
        device = next(next(iter(denoisers(pipe).values())).parameters()).device
        refused: dict[str, str] = {}

        def left(choices: Mapping[str, Technique]) -> tuple[str, ...]:
            return tuple(name for name, technique in choices.items() if _serves(pipe, name, technique, refused))

        steps = steps_of(pipe, run)
        distilled = bool(pipe.config.get("is_distilled"))
        few = distilled or steps <= FEW_STEPS
        if few:
            refused["caches"] = f"{steps} steps leave nothing to skip"
        return cls(
            own_steps=steps,
            networks=(OWN, *left({name: Student(name) for name in students})),
            solvers=(OWN, *left({name: Solver(max(2, steps // 2), name) for name in SOLVERS})),
            steps=tuple(sorted({max(2, round(share * steps)) for share in SHARES} - {steps})) if steps > 2 else (),
            weights=(NONE, *left(_weights(device))),
            attention=(NONE, *left(_attention(device, refused))),
            caches=(NONE, *(() if few else left({name: _cache(name, {}) for name in _CACHES}))),
            guidance=(NONE, *(() if few else left({name: _guidance(name) for name in ("every 2", *INTERVALS)}))),
            refused=refused,
        )

    def suggest(self, trial: "Trial") -> Point:
        """One point, from a sampler; what cannot matter beside the other choices is not asked for."""
        point: Point = {"network": trial.suggest_categorical("network", self.networks)}
        if point["network"] == OWN:
            self._suggest_sampling(trial, point)
        for part, choices in (("weights", self.weights), ("attention", self.attention)):
            point[part] = trial.suggest_categorical(part, choices) if len(choices) > 1 else NONE
        return point

    def _suggest_sampling(self, trial: "Trial", point: Point) -> None:
        point["solver"] = trial.suggest_categorical("solver", self.solvers)
        if point["solver"] != OWN and self.steps:
            point["steps"] = trial.suggest_categorical("steps", self.steps)
        if len(self.caches) > 1 and point.get("steps", self.own_steps) > FEW_STEPS:
            point["cache"] = trial.suggest_categorical("cache", self.caches)
            if point["cache"] != NONE:
                name, low, high = _CACHES[point["cache"]]
                integer = isinstance(low, int)
                value = (
                    trial.suggest_int(name, low, high) if integer else trial.suggest_float(name, low, high, log=True)
                )
                point[name] = value
        if len(self.guidance) > 1:
            point["guidance"] = trial.suggest_categorical("guidance", self.guidance)

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        """The recipe of a point. Raises ValueError if its techniques do not go together."""
        techniques: list[Technique] = []
        if point["network"] != OWN:
            techniques.append(Student(point["network"]))
        elif point["solver"] != OWN:
            techniques.append(Solver(point.get("steps", self.own_steps), point["solver"]))
        techniques += [_WEIGHTS[point["weights"]]] if point["weights"] != NONE else []
        techniques += [LowPrecisionAttention(point["attention"])] if point["attention"] != NONE else []
        techniques += [_cache(point["cache"], point)] if point.get("cache", NONE) != NONE else []
        techniques += [_guidance(point["guidance"])] if point.get("guidance", NONE) != NONE else []
        return Recipe(tuple(techniques))

    def starts(self) -> list[Point]:
        """Points to begin with: what a practitioner would write by hand, from one technique to all."""
        plain = {"weights": NONE, "attention": NONE}
        found: list[Point] = [{"network": OWN, "solver": OWN, **plain}]
        for network in self.networks[1:]:
            found += [{"network": network, **plain, "weights": weights} for weights in self.weights]
        solver = self.solvers[-1]
        for steps in self.steps if solver != OWN else ():
            point = {"network": OWN, "solver": solver, "steps": steps, **plain}
            found.append(point)
            if len(self.guidance) > 1:
                found.append({**point, "guidance": self.guidance[-1]})
        return [self._complete(point) for point in found]

    def _complete(self, point: Point) -> Point:
        """The point with every choice named that `suggest` would ask for."""
        if point["network"] == OWN and len(self.guidance) > 1:
            point.setdefault("guidance", NONE)
        if point["network"] == OWN and len(self.caches) > 1 and point.get("steps", self.own_steps) > FEW_STEPS:
            point.setdefault("cache", NONE)
        return point

    def stated(self) -> dict[str, Any]:
        """Plain data that says which space this is."""
        return {name: value for name, value in asdict(self).items() if name != "refused"}


_WEIGHTS: dict[str, Technique] = {
    "bfloat16": Bfloat16(),
    "int8": DynamicInt8(),
    "w8a8 int8": W8A8("int8"),
    "w8a8 fp8": W8A8("e4m3"),
}
_CACHES = {  # technique: its setting with the range that is searched
    "tea_cache": ("tea_cache threshold", 0.02, 1.0),
    "first_block_cache": ("first_block_cache threshold", 0.02, 1.0),
    "easy_cache": ("easy_cache threshold", 0.02, 1.0),
    "fixed_interval": ("fixed_interval every", 2, 4),
}


def _weights(device: torch.device) -> dict[str, Technique]:
    """Ways to store weights that may be faster on a device."""
    names = ("bfloat16", "w8a8 int8", "w8a8 fp8") if device.type == "cuda" else ("bfloat16", "int8")
    return {name: _WEIGHTS[name] for name in names}


def _attention(device: torch.device, refused: dict[str, str]) -> dict[str, Technique]:
    if device.type != "cuda":
        refused["attention in 8 bits"] = "it has no kernel for a CPU, where it is computed in float and slower"
        return {}
    return {name: LowPrecisionAttention(name) for name in ("int8", "fp8")}


def _cache(name: str, point: Mapping[str, Any]) -> Technique:
    setting, low, _ = _CACHES[name]
    kinds = {"tea_cache": TeaCache, "first_block_cache": FirstBlockCache, "easy_cache": EasyCache}
    value = point.get(setting, low)
    return FixedInterval(int(value)) if name == "fixed_interval" else kinds[name](float(value))


def _guidance(name: str) -> GuidanceCache:
    return GuidanceCache(2) if name == "every 2" else GuidanceCache(1, interval=INTERVALS[name])


def _serves(pipe: DiffusionPipeline, name: str, technique: Technique, refused: dict[str, str]) -> bool:
    """Whether the pipeline takes a technique; it is taken off again."""
    try:
        technique.apply(pipe)
    except (ValueError, FileNotFoundError) as error:
        refused[name] = str(error)
        return False
    technique.remove(pipe)
    return True
