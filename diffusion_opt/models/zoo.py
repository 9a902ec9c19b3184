"""The shipped models, and one door to every pipeline.

`load("fashion")` opens a model of this repository, `load("some/folder")` any diffusers pipeline on disk, and
`load("black-forest-labs/FLUX.2-klein-4B")` one from the hub: the only call of the package that may use the network,
and only when given a hub name. Weights are safetensors, never pickles; shipped files are checked against their SHA-256
first. Shipped weights are stored in half precision and computed in single precision, the fastest on a CPU.

A name that is not there is answered with the nearest one, and goes to the hub only if it can be no folder: with
`models/` beside it, `models/klien` is a typing error. How a folder is opened stands in `opening.py`. Pipelines with
packed weights are opened by `diffusion_opt.load`, which lies above this room and asks here for the rest.
"""

import copy
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn

from diffusion_opt.datasets import verify, write_sums
from diffusion_opt.datasets.writing import write_text
from diffusion_opt.models.opening import AUTO, Dtype, as_dtype, open_folder, place
from diffusion_opt.names import SHIPPED, check_name

QUANTIZED = "quantization.json"  # in the folder of a pipeline with packed weights
RECIPE = "recipe.json"  # in the folder of a pipeline that was saved with a recipe on it


def open_pipeline(folder: Path, dtype: Dtype = AUTO, **parts: object) -> DiffusionPipeline:
    """Open a pipeline on disk, with these parts in place of the stored ones. Raises what `open_folder` raises.

    Also raises ValueError for a folder with packed weights, unless the transformer is among the parts.
    """
    if (folder / QUANTIZED).is_file() and "transformer" not in parts:
        raise ValueError(f"{folder} holds packed weights: open it with diffusion_opt.load, which knows them")
    return open_folder(folder, dtype, **parts)


def load(
    name: str | Path, *, dtype: Dtype = AUTO, device: str | torch.device = "cpu", offload: str | None = None
) -> DiffusionPipeline:
    """Open a pipeline by shipped name, folder or hub name, ready to call.

    `dtype` is one type for all parts (a torch type or its name), or one for each ({"vae": …, "default": …}); "auto" is
    the type in which the denoising network is stored, and single precision for shipped models. `device` may be "auto",
    and `offload` "model", "sequential" or "group" to keep on it only what computes.

    Raises CorruptFileError if a shipped file is missing or altered, FileNotFoundError for a folder without a pipeline,
    ValueError for a name that is none of the three and what cannot be opened safely, OSError if the hub cannot be read.
    """
    dtype = as_dtype(dtype)
    if str(name) in SHIPPED:
        verify(SHIPPED[str(name)].folder)
    folder = locate(name)
    refuse_recipe(folder)
    return place(open_pipeline(folder, dtype), device, offload)


def refuse_recipe(folder: Path) -> None:
    """Raise ValueError for a folder with a recipe, which would come back without its techniques."""
    if (folder / RECIPE).is_file():
        raise ValueError(f"{folder} holds a recipe: open it with diffusion_opt.load, which puts it on again")


def locate(name: str | Path) -> Path:
    """The folder of a pipeline by shipped name, folder or hub name; a hub name is downloaded, unless it is there.

    Raises ValueError for a name that is none of the three, with the nearest that exists, and OSError if the hub cannot
    be read.
    """
    check_name(name)
    if str(name) in SHIPPED:
        return SHIPPED[str(name)].folder
    return Path(name) if Path(name).is_dir() else _downloaded(str(name))


def configs_of(name: str) -> Path:
    """The folder of a pipeline's configs and tokenizers; of a hub name only these are fetched.

    Raises ValueError as `locate` does, and OSError if they cannot be fetched.
    """
    check_name(name)
    if name in SHIPPED or Path(name).is_dir():
        return locate(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.safetensors.index.json"]))
    except OSError as error:
        raise OSError(f"cannot read the configs of {name} from the hub: {str(error).splitlines()[0]}") from error


def _downloaded(name: str) -> Path:
    """The folder to which the hub's files were downloaded. Raises OSError in one line if they cannot be."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise OSError(f"cannot open {name} from the hub, and it is not in its cache: {reason}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)


def ship(pipe: DiffusionPipeline, folder: Path, card: str) -> None:
    """Save a pipeline as the repository ships it: half-precision safetensors, a card, and the list of checksums.

    Text encoders of transformers stay as they are: that library opens them in the type they are stored in.
    """
    half = copy.deepcopy(pipe)
    for part in half.components.values():
        if isinstance(part, ModelMixin):
            nn.Module.to(part, torch.float16)
    half.save_pretrained(folder, safe_serialization=True)
    forget_origin(folder)
    write_text(folder / "README.md", card)
    write_sums(folder)


def forget_origin(folder: Path) -> None:
    """Drop `_name_or_path` from saved configs: diffusers notes there which folder of this machine a part came from."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
