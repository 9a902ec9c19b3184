"""A recipe: techniques in order, as data.

    Recipe((Student("fashion-1step"), DynamicInt8())).apply(pipe)

A recipe is checked before anything is touched: techniques of one kind exclude each other and the order is the one in
which they can act (what is sampled, then how weights are stored, then what is reused, then compilation). If one of
them refuses the pipeline, those already applied are taken back and the pipeline is as it was. Recipes are plain JSON:

    {"techniques": [{"technique": "student", "model": "fashion-1step"}, {"technique": "dynamic_int8"}]}
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from diffusers import DiffusionPipeline

from diffusion_opt.caching import (
    ChunkRegionCache,
    CompiledSchedule,
    EasyCache,
    EditRegionCache,
    ErrorBoundedCache,
    FirstBlockCache,
    FixedInterval,
    FixedSchedule,
    GenerationRegionCache,
    GuidanceCache,
    MagCache,
    ReferenceRegionCache,
    ScheduledCache,
    StepTable,
    StreamingRegionCache,
    TeaCache,
)
from diffusion_opt.datasets import read_json, write_json
from diffusion_opt.names import add, nearest
from diffusion_opt.quantization import PTQ, W8A8, Bfloat16, DynamicInt8, LowPrecisionAttention
from diffusion_opt.recipes.sampling import Compile, Solver, Student
from diffusion_opt.subjects import Run


class Technique(Protocol):
    """A frozen dataclass that acts on a pipeline in place."""

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Act, and return the pipeline. Raises ValueError with the reason if this pipeline does not allow it."""
        ...

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Undo `apply`; the output is bit-identical to what it was."""
        ...

    def describe(self) -> str:
        """One line for tables."""
        ...


@dataclass(frozen=True, slots=True)
class Kind:
    """What a technique changes (two of one kind exclude each other) and its place in the order."""

    place: int
    name: str


WHAT, HOW, STORED, ATTENDED, REUSED, SPARED, COMPILED = (
    Kind(0, "network"),
    Kind(1, "solver"),
    Kind(2, "weights"),
    Kind(3, "attention"),
    Kind(4, "cache"),
    Kind(5, "guidance cache"),
    Kind(6, "compilation"),
)
TECHNIQUES: dict[str, tuple[type, Kind]] = {
    "student": (Student, WHAT),
    "solver": (Solver, HOW),
    "bfloat16": (Bfloat16, STORED),
    "dynamic_int8": (DynamicInt8, STORED),
    "w8a8": (W8A8, STORED),
    "ptq": (PTQ, STORED),
    "low_precision_attention": (LowPrecisionAttention, ATTENDED),
    "fixed_interval": (FixedInterval, REUSED),
    "fixed_schedule": (FixedSchedule, REUSED),
    "tea_cache": (TeaCache, REUSED),
    "first_block_cache": (FirstBlockCache, REUSED),
    "mag_cache": (MagCache, REUSED),
    "easy_cache": (EasyCache, REUSED),
    "step_table": (StepTable, REUSED),
    "scheduled_cache": (ScheduledCache, REUSED),
    "error_bounded_cache": (ErrorBoundedCache, REUSED),
    "compiled_schedule": (CompiledSchedule, REUSED),
    "streaming_region_cache": (StreamingRegionCache, REUSED),
    "edit_region_cache": (EditRegionCache, REUSED),
    "generation_region_cache": (GenerationRegionCache, REUSED),
    "reference_region_cache": (ReferenceRegionCache, REUSED),
    "chunk_region_cache": (ChunkRegionCache, REUSED),
    "guidance_cache": (GuidanceCache, SPARED),
    "compile": (Compile, COMPILED),
}
_ON = "_diffusion_opt_recipe"  # in the pipeline's __dict__: what recipes put on it, by kind
_REGIONAL = {kind for name, (kind, _) in TECHNIQUES.items() if name.endswith("region_cache")}


def register(name: str, technique: type, kind: Kind) -> None:
    """Add a technique from outside, see `diffusion_opt.plugins`: a frozen dataclass that is a `Technique`.

    `kind` says what it changes, and so where it stands in a recipe and what it excludes: one of WHAT, HOW, STORED,
    ATTENDED, REUSED, SPARED, COMPILED, or a `Kind` of its own between them. Raises ValueError for a name that is taken
    or no word, and for a class that recipes could not write down.
    """
    if not is_dataclass(technique) or not technique.__dataclass_params__.frozen:
        raise ValueError(f"a technique is a frozen dataclass, because recipes write its fields down, got {technique!r}")
    if lacking := [word for word in ("apply", "remove", "describe") if not callable(getattr(technique, word, None))]:
        raise ValueError(f"{technique.__name__} lacks {', '.join(lacking)}: see `Technique` in recipes/recipe.py")
    add("technique", name, (technique, kind), TECHNIQUES)


def _names() -> dict[type, str]:
    return {technique: name for name, (technique, _) in TECHNIQUES.items()}


def _check_pairs(techniques: Sequence[Technique]) -> None:
    """Raise ValueError for two techniques that lie in the right order and do not go together."""
    kinds = {type(technique): technique for technique in techniques}
    regional = next((kind for kind in kinds if kind in _REGIONAL), None)
    for other in (GuidanceCache, Compile):
        if regional is not None and other in kinds:
            raise ValueError(
                f"{regional.__name__} computes some of the tokens of a pass, and {other.__name__} takes whole passes: "
                "leave one out"
            )
    if CompiledSchedule in kinds and Compile in kinds:
        raise ValueError("CompiledSchedule compiles both kinds of its passes: leave Compile out")
    for stored in (DynamicInt8, PTQ):
        if CompiledSchedule in kinds and stored in kinds:
            raise ValueError(
                f"CompiledSchedule captures passes whole, and the layers of {stored.__name__} cannot be captured: use "
                "FixedSchedule with the same mask"
            )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Techniques in the order in which they are applied; the empty recipe is the pipeline as it comes."""

    techniques: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "techniques", tuple(self.techniques))
        names = _names()
        for technique in self.techniques:
            if type(technique) not in names:
                raise ValueError(f"unknown technique {technique!r}; there are {', '.join(TECHNIQUES)}")
        _check_pairs(self.techniques)
        kinds = [TECHNIQUES[names[type(t)]][1] for t in self.techniques]
        for first, second in pairwise(kinds):
            if first == second:
                raise ValueError(f"a recipe can change the {first.name} once, got two techniques that do")
            if first.place > second.place:
                raise ValueError(f"the {second.name} must be changed before the {first.name}; swap the two techniques")

    def describe(self) -> str:
        """One line."""
        return " + ".join(t.describe() for t in self.techniques) or "as it comes"

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Apply all techniques, or none: if one refuses (ValueError), the pipeline is put back as it was."""
        done: list[Technique] = []
        try:
            for technique in self.techniques:
                technique.apply(pipe)
                done.append(technique)
            note(pipe, self.techniques)
        except BaseException:
            for technique in reversed(done):
                technique.remove(pipe)
            raise
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take all techniques back, last first."""
        for technique in reversed(self.techniques):
            technique.remove(pipe)
        forget(pipe, self.techniques)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Raises ValueError for a technique with a run whose arguments are pictures or tensors."""
        names = _names()
        return {"techniques": [{"technique": names[type(t)], **_settings(t)} for t in self.techniques]}

    @classmethod
    def from_dict(cls, data: Any) -> "Recipe":
        """The inverse of `to_dict`. Raises ValueError naming the unknown technique or field, and the nearest."""
        if not isinstance(data, dict) or not isinstance(data.get("techniques"), list):
            raise ValueError('a recipe is {"techniques": [{"technique": name, setting: value, …}, …]}')
        for entry in data["techniques"]:
            if not isinstance(entry, dict) or not isinstance(entry.get("technique"), str):
                raise ValueError(f'an entry of a recipe is {{"technique": name, setting: value, …}}, got {entry!r}')
        return cls(tuple(_technique(dict(entry)) for entry in data["techniques"]))

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe from a JSON file."""
        return cls.from_dict(read_json(Path(path), "save the recipe again"))


def _settings(technique: Technique) -> dict[str, Any]:
    """The settings of a technique as JSON holds them; a run it carries among them."""
    settings = asdict(technique)
    for name, value in settings.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name} of {_names()[type(technique)]!r} cannot be written to a file ({error}): leave pictures and "
                "tensors out of its run, and give them when the technique is made"
            ) from error
    return settings


def _technique(settings: dict[str, Any]) -> Technique:
    """A technique from its settings as JSON holds them."""
    name = settings.pop("technique", None)
    if name not in TECHNIQUES:
        hint = nearest(str(name), TECHNIQUES)
        raise ValueError(f"unknown technique {name!r} in recipe{hint}; there are {', '.join(TECHNIQUES)}")
    technique = TECHNIQUES[name][0]
    known = [field.name for field in fields(technique)]
    if unknown := sorted(set(settings) - set(known)):
        hint = nearest(unknown[0], known)
        raise ValueError(f"technique {name!r} has no setting {unknown[0]!r}{hint}; it has {', '.join(known) or 'none'}")
    if isinstance(settings.get("run"), dict):
        settings["run"] = Run(**settings["run"])
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return technique(**given)
    except TypeError as error:  # a setting of another kind, or one that is left out
        raise ValueError(f"technique {name!r} of the recipe: {error}") from error


def kind_of(technique: Technique) -> Kind:
    """What a technique changes."""
    return TECHNIQUES[_names()[type(technique)]][1]


def note(pipe: DiffusionPipeline, techniques: Sequence[Technique]) -> None:
    """Remember on the pipeline what is on it, so that a folder can say it; one of each kind."""
    if techniques:
        pipe.__dict__.setdefault(_ON, {}).update({kind_of(technique): technique for technique in techniques})


def forget(pipe: DiffusionPipeline, techniques: Sequence[Technique]) -> None:
    """These are no longer on the pipeline."""
    on = pipe.__dict__.get(_ON, {})
    for technique in techniques:
        on.pop(kind_of(technique), None)
    if not on:
        pipe.__dict__.pop(_ON, None)


def applied(pipe: DiffusionPipeline) -> dict[Kind, Technique]:
    """What recipes put on this pipeline, in order; a technique that was then removed by itself is still named."""
    on = pipe.__dict__.get(_ON, {})
    return {kind: on[kind] for kind in sorted(on, key=lambda kind: kind.place)}


def apply(pipe: DiffusionPipeline, *techniques: Technique) -> DiffusionPipeline:
    """Apply techniques to a pipeline: short for `Recipe(techniques).apply(pipe)`."""
    return Recipe(techniques).apply(pipe)
