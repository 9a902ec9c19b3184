"""The recipe travels: one folder that holds a pipeline as a recipe left it, and opens by its name alone.

    Recipe.load("fast.json").apply(pipe)
    diffusion_opt.save(pipe, "fast")          # another machine, another day:
    pipe = diffusion_opt.load("fast")         # the same bits from the same noise

Some techniques change what is stored: a student's network, a solver's scheduler and steps, the shift and the times of
a student, packed and 8-bit layers. They are in the files already. The others live in the process: caches, guidance
intervals, attention in fewer bits, bfloat16, compilation. Those are written down, and `load` puts them on again:

    folder/recipe.json       what to put on again, what the files hold already, and the type of each part
           recipe/*.json     calibrations, schedules and error bounds that those techniques read
           SHA256SUMS        of all files
           ...               the rest as diffusers, or `save_quantized`, writes it

diffusers alone opens such a folder too where no layer is packed: it finds its own files, ignores recipe.json, and gives
the pipeline without what lives in the process. Weights in bfloat16 are saved in float32 and rounded again by `load`.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.caching import ErrorBound, ErrorBoundedCache, MagCache, ScheduledCache, StepTable, TeaCache
from diffusion_opt.caching.calibration.step_calibration import StepCalibration
from diffusion_opt.caching.guidance_cache import HOOK_NAME as GUIDANCE_HOOK
from diffusion_opt.caching.schedules.schedule import CacheSchedule
from diffusion_opt.caching.step.stack import COMPILED_HOOK_NAME, REGION_HOOK_NAME
from diffusion_opt.caching.step.stack import HOOK_NAME as STEP_HOOK
from diffusion_opt.datasets import CorruptFileError, read_json, verify, write_json, write_sums
from diffusion_opt.models.opening import AUTO, Dtype, as_dtype, place, settled
from diffusion_opt.models.zoo import QUANTIZED, RECIPE, forget_origin, locate, open_pipeline
from diffusion_opt.quantization import Bfloat16, LowPrecisionAttention
from diffusion_opt.quantization.attention.low_precision import attention_of
from diffusion_opt.quantization.faster import bfloat16
from diffusion_opt.quantization.guards import refuse_adapters
from diffusion_opt.quantization.packed import storage
from diffusion_opt.quantization.packed.network import main_type, packed_layers
from diffusion_opt.quantization.simulation.simulate import simulated_formats
from diffusion_opt.recipes.recipe import (
    ATTENDED,
    COMPILED,
    HOW,
    REUSED,
    SPARED,
    STORED,
    WHAT,
    Kind,
    Recipe,
    Technique,
    applied,
    kind_of,
)
from diffusion_opt.recipes.sampling import is_compiled
from diffusion_opt.subjects import denoisers

VERSION = 1
FILES = "recipe"  # folder of the files that techniques read
READS = {  # which setting of a technique names a file, and what reads that file
    TeaCache: ("curve", StepCalibration),
    MagCache: ("calibration", StepCalibration),
    StepTable: ("calibration", StepCalibration),
    ScheduledCache: ("schedule", CacheSchedule),
    ErrorBoundedCache: ("calibration", ErrorBound),
}


def save(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline with what `Recipe.apply` put on it to a new folder that `load` opens; the pipeline stays as is.

    Raises ValueError if the folder holds something, if a technique is on the pipeline that no recipe put there, if a
    network is quantized in simulation (call `pack` first), or if a technique's settings hold pictures or tensors.
    """
    folder = Path(folder)
    techniques = _on(pipe, folder)
    again, held = _split(pipe, techniques)
    fresh = folder.absolute().with_name(f".{folder.absolute().name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _float_weights(pipe, techniques):
            _write(pipe, fresh)
            dtypes = {name: str(kind).removeprefix("torch.") for name, kind in _types(pipe).items()}
        record = {
            "version": VERSION,
            **Recipe(_with_files(again, fresh / FILES)).to_dict(),
            "held": [technique.describe() for technique in held],
            "dtypes": dtypes,
        }
        write_json(fresh / RECIPE, record)
        write_sums(fresh)
        if folder.is_dir():
            folder.rmdir()
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(
    name: str | Path, *, dtype: Dtype = AUTO, device: str | torch.device = "cpu", offload: str | None = None
) -> DiffusionPipeline:
    """Open a pipeline by shipped name, folder or hub name, with whatever recipe its folder holds, ready to call.

    Settings as in `models.load`; with "auto" every part of a folder that `save` wrote has the type it had. Raises what
    `models.load` and `load_quantized` raise, CorruptFileError for a damaged recipe, and ValueError with the reason if a
    technique of the recipe refuses this machine.
    """
    dtype, folder = as_dtype(dtype), locate(name)
    if not (folder / RECIPE).is_file():
        return storage.load(name, dtype=dtype, device=device, offload=offload)
    verify(folder)
    recipe, dtypes = _read(folder)
    device = settled(device)
    if (folder / QUANTIZED).is_file():
        pipe = storage.load_quantized(folder, dtype=dtype, device=device)
    else:
        pipe = place(open_pipeline(folder, dtypes if dtype == AUTO else dtype), device)
    recipe.apply(pipe)
    return pipe if offload is None else place(pipe, device, offload)


def _on(pipe: DiffusionPipeline, folder: Path) -> list[Technique]:
    """What is on the pipeline. Raises ValueError for what cannot be saved, before anything is written."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder, so that no file of another model stays in it")
    for name, network in denoisers(pipe).items():
        if simulated_formats(network):
            raise ValueError(f"{name} is quantized in simulation: call pack(pipe) and save it then")
        refuse_adapters(network, "save it")
    known, found = applied(pipe), _found(pipe)
    if _is_packed(pipe):
        found.discard(ATTENDED)  # `quantization.json` says it
    for kind in found - known.keys():
        raise ValueError(
            f"a technique is on this pipeline that no recipe put there (it changes the {kind.name}): remove it and "
            "apply it with Recipe((…,)).apply(pipe), so that the folder can say it"
        )
    outside = {kind for kind, technique in known.items() if not type(technique).__module__.startswith("diffusion_opt.")}
    for kind in outside & {WHAT, HOW, STORED}:
        raise ValueError(
            f"{type(known[kind]).__name__} of a plugin changes the {kind.name}, and whether files hold that is not "
            "known here: remove it, save, and apply it again"
        )
    lasting = known.keys() & {WHAT, HOW, STORED} - ({STORED} if isinstance(known.get(STORED), Bfloat16) else set())
    return [technique for kind, technique in known.items() if kind in found | lasting | outside]


def _found(pipe: DiffusionPipeline) -> set[Kind]:
    """The kinds of techniques that have left a trace on the networks and live in the process."""
    found: set[Kind] = set()
    for network in denoisers(pipe).values():
        hooks = {name for part in network.modules() for name in getattr(_registry(part), "hooks", ())}
        found |= {REUSED} if hooks & {STEP_HOOK, COMPILED_HOOK_NAME, REGION_HOOK_NAME} else set()
        found |= {SPARED} if GUIDANCE_HOOK in hooks else set()
        found |= {ATTENDED} if attention_of(network) is not None else set()
        found |= {STORED} if hasattr(network, bfloat16.UNDO) else set()
    return found | ({COMPILED} if is_compiled(pipe) else set())


def _registry(module: nn.Module) -> Any:
    return getattr(module, "_diffusers_hook", None)


def _is_packed(pipe: DiffusionPipeline) -> bool:
    return any(packed_layers(network) for network in denoisers(pipe).values())


def _split(pipe: DiffusionPipeline, techniques: Sequence[Technique]) -> tuple[list[Technique], list[Technique]]:
    """The techniques that `load` has to put on again, and those that the files hold."""
    packed = _is_packed(pipe)
    again, held = [], []
    for technique in techniques:
        stored = kind_of(technique) in (WHAT, HOW, STORED) and not isinstance(technique, Bfloat16)
        stored |= packed and isinstance(technique, LowPrecisionAttention)  # `quantization.json` says it
        (held if stored else again).append(technique)
    return again, held


@contextmanager
def _float_weights(pipe: DiffusionPipeline, techniques: Sequence[Technique]) -> Iterator[None]:
    """Weights that bfloat16 rounded, as they were before, for as long as they are written."""
    rounded = [technique for technique in techniques if isinstance(technique, Bfloat16)]
    for technique in rounded:
        technique.remove(pipe)
    try:
        yield
    finally:
        for technique in rounded:
            replace(technique, require_fast=False).apply(pipe)  # it was allowed here before


def _write(pipe: DiffusionPipeline, folder: Path) -> None:
    if _is_packed(pipe):
        storage.save_quantized(pipe, folder)
        return
    pipe.save_pretrained(folder, safe_serialization=True)
    forget_origin(folder)


def _types(pipe: DiffusionPipeline) -> dict[str, torch.dtype]:
    """The type of each part, and as "default" that of the denoiser."""
    found = {
        name: main_type(part.parameters()) for name, part in pipe.components.items() if isinstance(part, nn.Module)
    }
    return {"default": found[next(iter(denoisers(pipe)))], **found}


def _with_files(techniques: Sequence[Technique], folder: Path) -> tuple[Technique, ...]:
    """The techniques with the files they read copied to a folder and named by their place in it."""
    moved = []
    for technique in techniques:
        setting, reader = _read_by(technique)
        if setting is not None:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{type(technique).__name__}.json"
            reader.load(getattr(technique, setting)).save(folder / name)
            technique = replace(technique, **{setting: f"{FILES}/{name}"})
        moved.append(technique)
    return tuple(moved)


def _read_by(technique: Technique) -> tuple[str | None, Any]:
    """The setting that names a file, and what reads it; None if the technique reads none."""
    setting, reader = READS.get(type(technique), (None, None))
    if isinstance(technique, TeaCache) and not technique.calibrated:
        return None, None
    return setting, reader


def _read(folder: Path) -> tuple[Recipe, dict[str, torch.dtype]]:
    """What to put on, with its files found, and the types of the parts. Raises CorruptFileError for another file."""
    path = folder / RECIPE
    record = read_json(path, "save the pipeline again")
    if not isinstance(record, dict) or set(record) != {"version", "techniques", "held", "dtypes"}:
        raise CorruptFileError(f"{path} is no recipe that `save` wrote: save the pipeline again")
    if record["version"] != VERSION:
        raise CorruptFileError(f"{path} is of version {record['version']}, this package reads {VERSION}: save it again")
    techniques = []
    for technique in Recipe.from_dict({"techniques": record["techniques"]}).techniques:
        setting, _ = _read_by(technique)
        if setting is not None:
            technique = replace(technique, **{setting: str(folder / getattr(technique, setting))})
        techniques.append(technique)
    return Recipe(tuple(techniques)), {name: getattr(torch, kind) for name, kind in record["dtypes"].items()}
