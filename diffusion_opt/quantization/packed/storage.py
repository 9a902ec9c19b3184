"""A quantized pipeline in a folder, and back in another process with the same output, bit for bit.

    save_quantized(pipe, folder)        after pack(pipe), or after DynamicInt8().apply(pipe) or W8A8().apply(pipe)
    load(folder)                        any pipeline, packed or not; the front door (`recipes/saving.py`) asks here

    folder/quantization.json            layers and formats of each network, types of all parts, the format of attention
           transformer/packed.safetensors   codes and scales, and what was not quantized; of transformer_2 too, if any
           SHA256SUMS                   of all files
           ...                          the rest as diffusers saves it

The weights have a name of their own because diffusers, which knows nothing of these layers, would open a familiar name,
find half of it missing and go on with random numbers. A folder appears under its name when all of it is written. What
is loaded is checked: files by checksum, the model by the identity of the float network it was made from, each tensor by
name, shape and type. Every part comes back in the type it had, unless another one is asked for.

The integers of `DynamicInt8` and of `W8A8("int8")` are the same, so either folder opens on either machine, to the layer
that is the fast one there.

modelopt's `mto.save` stores pickles, and diffusers cannot read back what it saves for compressed models.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt import models
from diffusion_opt.datasets import CorruptFileError, verify, write_sums
from diffusion_opt.datasets.integrity import SUMS
from diffusion_opt.datasets.writing import read_json, write_json
from diffusion_opt.models.call_defaults import save_call_defaults
from diffusion_opt.models.opening import AUTO, Dtype, as_dtype, place, settled, stored_dtype
from diffusion_opt.models.zoo import QUANTIZED, forget_origin, locate, open_pipeline, refuse_recipe
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention, attention_of
from diffusion_opt.quantization.faster import bfloat16
from diffusion_opt.quantization.guards import PACKED, close_saving
from diffusion_opt.quantization.packed.network import FILE, load_network, main_type, packed_layers, save_network
from diffusion_opt.quantization.simulation.simulate import simulated_formats
from diffusion_opt.subjects import denoisers

WEIGHTS = f"transformer/{FILE}"
VERSION = 2  # of quantization.json; 1 knew one network, and float32 only


def save_quantized(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline with packed layers to a folder that `load` opens.

    Raises ValueError if no layer is packed (call `pack` first), if a network is quantized in simulation or by
    `Bfloat16`, which have no place in a folder, or if the folder holds something already.
    """
    folder, networks = Path(folder), denoisers(pipe)
    packed = {name: network for name, network in networks.items() if packed_layers(network)}
    if not packed:
        raise ValueError("no layer of this pipeline is packed: call pack(pipe) after PTQ, or save with save_pretrained")
    for name, network in networks.items():
        if simulated_formats(network):
            raise ValueError(f"{name} is quantized in simulation: call pack(pipe), or remove that first")
        if hasattr(network, bfloat16.UNDO):
            raise ValueError(f"{name} is under Bfloat16, which a folder does not hold: remove it, save, apply it again")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder, so that no file of another model stays in it")
    fresh = folder.absolute().with_name(f".{folder.absolute().name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        _write(pipe, packed, fresh)
        if folder.is_dir():
            folder.rmdir()
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(pipe: DiffusionPipeline, packed: Mapping[str, nn.Module], folder: Path) -> None:
    """All files of a pipeline whose packed networks these are."""
    for name, part in pipe.components.items():
        if part is not None and name not in packed:
            part.save_pretrained(folder / name)
    pipe.save_config(folder)
    save_call_defaults(pipe, folder)
    record = {
        "version": VERSION,
        "networks": {name: save_network(network, folder / name) for name, network in packed.items()},
        "attention": None if (attention := attention_of(next(iter(packed.values())))) is None else asdict(attention),
        "dtypes": {
            name: str(main_type(part.parameters())).removeprefix("torch.")
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module) and name not in packed
        },
    }
    forget_origin(folder)
    write_json(folder / QUANTIZED, record)
    write_sums(folder)


def load(
    name: str | Path, *, dtype: Dtype = AUTO, device: str | torch.device = "cpu", offload: str | None = None
) -> DiffusionPipeline:
    """Open a pipeline by shipped name, folder or hub name, packed or not, ready to call; settings as in `models.load`.

    Raises what `models.load` and `load_quantized` raise.
    """
    dtype, folder = as_dtype(dtype), locate(name)
    refuse_recipe(folder)
    if (folder / QUANTIZED).is_file() or (folder / WEIGHTS).is_file():
        return load_quantized(folder, dtype=dtype, device=device, offload=offload)
    return models.load(name, dtype=dtype, device=device, offload=offload)


def load_quantized(
    folder: str | Path, *, dtype: Dtype = AUTO, device: str | torch.device = "cpu", offload: str | None = None
) -> DiffusionPipeline:
    """Open what `save_quantized` wrote; on a device of the same kind the output is that of the saved pipeline.

    With "auto" every part has the type in which it was saved. Raises CorruptFileError if a file is missing, damaged or
    unreadable, and ValueError if the files do not belong together: another model, another format, another shape.
    """
    folder, device, dtype = Path(folder), settled(device), as_dtype(dtype)
    if not (folder / SUMS).is_file():
        raise CorruptFileError(f"{folder} has no {SUMS}, so it was not saved to its end: save the pipeline again")
    verify(folder)
    record = _read_record(folder)
    dtypes = _dtypes(folder, record, dtype)
    parts = {
        name: load_network(folder / name, about, _asked(dtypes, name), device.type == "cpu")
        for name, about in record["networks"].items()
    }
    pipe = place(open_pipeline(folder, dtypes, **parts), device, offload)
    close_saving(pipe, PACKED["save_pretrained"])
    return pipe if record["attention"] is None else LowPrecisionAttention(**record["attention"]).apply(pipe)


def _dtypes(folder: Path, record: Mapping[str, Any], dtype: Dtype) -> Dtype:
    """The types to open the parts of a pipeline in; packed networks are left out where they have their own."""
    if dtype != AUTO:
        return dtype
    if record["version"] == 1:
        return stored_dtype(folder)
    main = next(iter(record["networks"].values()))["dtype"]
    return {name: getattr(torch, kind) for name, kind in {"default": main, **record["dtypes"]}.items()}


def _asked(dtypes: Dtype, name: str) -> torch.dtype | None:
    """The type that a packed network is opened in; None: each tensor in its own."""
    return dtypes.get(name) if isinstance(dtypes, Mapping) else dtypes


def _read_record(folder: Path) -> dict[str, Any]:
    """The configuration file. Raises CorruptFileError unless it is one, and of a version that is known."""
    path = folder / QUANTIZED
    record = read_json(path, f"{WEIGHTS} cannot be read without it: save the pipeline again")
    if set(record) == {"version", "model", "attention", "layers"} and record["version"] == 1:
        network = {"model": record["model"], "layers": record["layers"]}
        return {"version": 1, "networks": {"transformer": network}, "attention": record["attention"], "dtypes": {}}
    if set(record) != {"version", "networks", "attention", "dtypes"} or record["version"] != VERSION:
        raise CorruptFileError(
            f"{path} is of version {record.get('version')}, this package reads version {VERSION}: save it again"
        )
    return record
