"""The shipped models, and one door to every pipeline.

`load("fashion")` opens a model of this repository, `load("some/folder")` any diffusers pipeline on disk, and
`load("black-forest-labs/FLUX.2-klein-4B")` one from the hub: the only call of the package that may use the network,
and only when given a hub name. Weights are safetensors, never pickles; shipped files are checked against their SHA-256
first. Shipped weights are stored in half precision and computed in single precision, the fastest on a CPU.

Pipelines with packed weights are opened by `diffusion_opt.load`, which lies above this room and asks here for the rest.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn

from diffusion_opt.datasets import CorruptFileError, data_dir, verify, write_sums
from diffusion_opt.models.pipeline import TinyFlux2Pipeline

QUANTIZED = "quantization.json"  # in the folder of a pipeline with packed weights


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A model of this repository; how it was made and how good it is stands in its card, `folder / "README.md"`."""

    name: str
    summary: str
    teacher: str | None = None  # None: trained on data; otherwise the shipped model it was distilled from
    quantized_from: str | None = None  # the shipped model that this one holds in fewer bits

    @property
    def folder(self) -> Path:
        return data_dir() / "models" / self.name


SHIPPED = {
    model.name: model
    for model in (
        ShippedModel("fashion", "Fashion-MNIST 28x28, hidden 256, 49 tokens, 4.6 M parameters: the teacher"),
        ShippedModel("fashion-4step", "4 steps, guidance 2 distilled in", "fashion"),
        ShippedModel("fashion-4step-interval", "4 steps, guidance 2 from t = 0.3 to 0.9 distilled in", "fashion"),
        ShippedModel("fashion-4step-int8", "fashion-4step on the INT8 kernel of the CPU", "fashion", "fashion-4step"),
        ShippedModel("fashion-4step-nvfp4", "fashion-4step in 4.5 bits a weight", "fashion", "fashion-4step"),
        ShippedModel("fashion-2step", "2 steps, guidance 2 from t = 0.3 to 0.9 distilled in", "fashion"),
        ShippedModel("fashion-1step", "1 step, guidance 2 from t = 0.3 to 0.8 distilled in", "fashion"),
        ShippedModel("fashion-micro", "Fashion-MNIST 16x16, hidden 128, 16 tokens, 1.2 M: trains in minutes"),
    )
}


def open_pipeline(folder: Path, dtype: torch.dtype, **parts: nn.Module) -> DiffusionPipeline:
    """Open a pipeline on disk, with these parts in place of the stored ones. Raises what `load` raises."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    if (folder / QUANTIZED).is_file() and "transformer" not in parts:
        raise ValueError(f"{folder} holds packed weights: open it with diffusion_opt.load, which knows them")
    try:
        class_name = json.loads(index.read_text()).get("_class_name")
    except json.JSONDecodeError as error:
        raise CorruptFileError(
            f"{index} is not valid JSON ({error}); restore it with git or download it anew"
        ) from error
    pipeline_class = TinyFlux2Pipeline if class_name == TinyFlux2Pipeline.__name__ else DiffusionPipeline
    bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()  # opening a few megabytes needs no bar
    try:
        return pipeline_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, **parts
        )
    finally:
        if bars:
            diffusers_logging.enable_progress_bar()


def load(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """Open a pipeline by shipped name, folder or hub name, ready to call on `device`.

    Raises CorruptFileError if a shipped file is missing or altered, FileNotFoundError for a folder without a pipeline,
    ValueError for a name that is none of the three.
    """
    if str(name) in SHIPPED:
        folder = SHIPPED[str(name)].folder
        verify(folder)
        pipe = open_pipeline(folder, dtype)
    elif Path(name).is_dir():
        pipe = open_pipeline(Path(name), dtype)
    elif isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
    else:
        raise ValueError(
            f"unknown model {str(name)!r}: use one of {', '.join(SHIPPED)}, a folder that holds a pipeline, "
            "or a hub name such as 'black-forest-labs/FLUX.2-klein-4B'"
        )
    return pipe.to(device)


def ship(pipe: TinyFlux2Pipeline, folder: Path, card: str) -> None:
    """Save a pipeline as the repository ships it: half-precision safetensors, a card, and the list of checksums."""
    half = copy.deepcopy(pipe)
    for part in half.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float16)
    half.save_pretrained(folder, safe_serialization=True)
    forget_origin(folder)
    (folder / "README.md").write_text(card)
    write_sums(folder)


def forget_origin(folder: Path) -> None:
    """Drop `_name_or_path` from saved configs: diffusers notes there which folder of this machine a part came from."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
