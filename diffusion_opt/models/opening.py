"""Open a pipeline's folder: which code it may run, in which type its numbers are, and where they lie.

`DiffusionPipeline.from_pretrained` does the work. What is decided here is what it leaves open:

- **Code.** `model_index.json` can name Python files of the folder, which diffusers imports. Only classes of installed
  libraries are opened here, and only safetensors, never pickles.
- **Type.** Without a `dtype` diffusers opens networks in single precision and transformers opens text encoders as
  stored, so a pipeline saved in bfloat16 comes back half of each. Here `"auto"` is one type for all parts, that in
  which the denoising network is stored: the bulk of the bytes in the headers of its safetensors files. Small
  class-conditional models and shipped ones are stored in half and computed in single precision, the fastest on a CPU.
  Modules that a class keeps in single precision (`_keep_in_fp32_modules`: norms and time embedders of Wan) stay so.
- **Place.** Offloading moves a pipeline that does not fit onto a GPU part by part: `"model"` whole networks,
  `"sequential"` layer by layer and slow, `"group"` layer by layer and ahead of time on a stream of its own.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion_opt.datasets import CorruptFileError, read_json
from diffusion_opt.datasets.writing import write_json
from diffusion_opt.models.call_defaults import load_call_defaults
from diffusion_opt.models.pipeline import TinyFlux2Pipeline
from diffusion_opt.names import is_shipped

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("model", "sequential", "group")
DENOISERS = ("transformer", "transformer_2", "unet")  # folders whose type is that of the pipeline
LIBRARIES = ("diffusers", "transformers", "diffusion_opt")
LARGE_BYTES = 1e9  # from here on opening takes long enough for a progress bar
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
_WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

Dtype = str | torch.dtype | Mapping[str, torch.dtype]


def as_dtype(dtype: Dtype) -> Dtype:
    """A type by name or itself; "auto" and a mapping from component to type (with "default") pass.

    Raises ValueError for other names and for types that no pipeline computes in.
    """
    if isinstance(dtype, Mapping) or dtype == AUTO:
        return dtype
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)} (or torch's own of these), got {dtype!r}")
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of most bytes of the folder's denoising network; of its other networks if that one is packed.

    Raises ValueError if it is a type to store in and not one to compute in, such as float8.
    """
    if _class_name(read_index(folder)) == TinyFlux2Pipeline.__name__ or is_shipped(folder):
        return torch.float32
    found: Counter[str] = Counter()
    for part in DENOISERS:
        if not list((folder / part).glob("packed*.safetensors")):
            found += _bytes_by_type(folder / part)
    if not found:
        for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in DENOISERS):
            found += _bytes_by_type(part)
    if not found:
        return torch.float32
    name = found.most_common(1)[0][0]
    if name not in _STORED:
        raise ValueError(f"{folder} is stored in {name}, in which nothing computes: give dtype={', '.join(DTYPES)}")
    return _STORED[name]


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`. Raises FileNotFoundError without one and CorruptFileError if it is not valid JSON."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    index = read_json(path, "restore it with git or download it anew")
    if not isinstance(index, dict) or "_class_name" not in index:
        raise CorruptFileError(f"{path} names no pipeline class; restore it with git or download it anew")
    return index


def open_folder(folder: Path, dtype: Dtype = AUTO, **parts: object) -> DiffusionPipeline:
    """Open a pipeline on disk on the CPU, with these parts in place of the stored ones; nothing is downloaded.

    Raises FileNotFoundError, CorruptFileError, and ValueError for a folder that wants to run code of its own, a class
    that the installed diffusers lacks, and a type that cannot be.
    """
    index = read_index(folder)
    check_code(folder, index)
    dtype = as_dtype(dtype)
    dtype = stored_dtype(folder) if dtype == AUTO else dtype
    own = _class_name(index) == TinyFlux2Pipeline.__name__
    size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    with _bars(size >= LARGE_BYTES), _without(folder, index, parts) as rest:
        pipe = (TinyFlux2Pipeline if own else DiffusionPipeline).from_pretrained(
            rest, dtype=dtype, use_safetensors=True, local_files_only=True, **parts
        )
    pipe.register_to_config(_name_or_path=str(folder))
    load_call_defaults(pipe, folder)
    return pipe


@contextmanager
def _without(folder: Path, index: Mapping[str, Any], parts: Iterable[str]) -> Iterator[Path]:
    """The folder, as one whose index does not name these parts.

    diffusers opens a part from disk although it was handed over, where the pipeline's class can do without it, as
    Wan's can without either of its transformers.
    """
    if not (named := set(parts) & set(index)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        rest = Path(name)
        for path in folder.absolute().iterdir():
            if path.name != "model_index.json":
                (rest / path.name).symlink_to(path)
        write_json(rest / "model_index.json", {**index, **{part: [None, None] for part in named}})
        yield rest


def settled(device: str | torch.device) -> torch.device:
    """A device; "auto" is the GPU if torch sees one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device)


def place(pipe: DiffusionPipeline, device: str | torch.device, offload: str | None = None) -> DiffusionPipeline:
    """Put a pipeline on a device ("auto": the GPU if torch sees one), or offload it part by part.

    Raises ValueError for a way to offload that does not exist, and for offloading without a GPU.
    """
    device = settled(device)
    if offload is None:
        return pipe.to(device, silence_dtype_warnings=True)  # float16 computes on a CPU, whatever diffusers says
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be None or one of {', '.join(OFFLOADS)}, got {offload!r}")
    if device.type == "cpu":
        raise ValueError(f"offload={offload!r} moves parts from the CPU to a GPU and back, but the device is the CPU")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    return pipe


def _class_name(index: Mapping[str, Any]) -> Any:
    return index["_class_name"]


def check_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise ValueError unless every class that the index names comes from an installed library."""
    name = _class_name(index)
    if not isinstance(name, str):
        raise ValueError(f"{folder} wants to run Python code of its own ({name}), which is never done here")
    if name != TinyFlux2Pipeline.__name__ and not hasattr(diffusers, name):
        raise ValueError(f"{folder} is a {name}, which the installed diffusers {diffusers.__version__} does not have")
    for part, value in index.items():
        is_part = isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)
        if not is_part or part.startswith("_"):  # two ladders, or a lowest and a highest scale, are settings
            continue
        library = value[0]
        if library.partition(".")[0] not in LIBRARIES and not hasattr(diffusers.pipelines, library):
            raise ValueError(
                f"{folder} takes its {part} from {library!r}, which is no library of these: {', '.join(LIBRARIES)}"
            )
        if (folder / part / f"{library}.py").is_file():
            raise ValueError(f"{folder} wants to run Python code of its own ({part}/{library}.py): never done here")


def _bytes_by_type(part: Path) -> "Counter[str]":
    """Bytes of each floating type in the safetensors files of a component, read off their headers."""
    found: Counter[str] = Counter()
    for path in sorted(part.glob("*.safetensors")):
        if path.name.count(".") > 1:  # model.fp16.safetensors: a second copy, of another variant
            continue
        for entry in _header(path).values():
            if entry.get("dtype") in _WIDTH:
                first, last = entry["data_offsets"]
                found[entry["dtype"]] += last - first
    return found


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file. Raises CorruptFileError if it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= path.stat().st_size else b""
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CorruptFileError(f"{path} is no safetensors file: restore it with git or download it anew") from error
    header.pop("__metadata__", None)
    return header


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Progress bars of diffusers and transformers as they are, or off for as long as this lasts."""
    libraries = [] if shown else [diffusers_logging, transformers_logging]
    switched = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in switched:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in switched:
            library.enable_progress_bar()
