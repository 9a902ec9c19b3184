"""A quantized pipeline in a folder, and back in another process with the same output, bit for bit.

    save_quantized(pipe, folder)        after pack(pipe), or after DynamicInt8().apply(pipe) or W8A8().apply(pipe)
    diffusion_opt.load(folder)          any pipeline: this is where the front door looks whether weights are packed

    folder/quantization.json            the layers and their formats, that of attention, and the model they belong to
           transformer/packed.safetensors   codes and scales, and what was not quantized
           SHA256SUMS                   of all files
           ...                          the rest as diffusers saves it

The weights have a name of their own because diffusers, which knows nothing of these layers, would open a familiar name,
find half of it missing and go on with random numbers. Tensors in single precision are stored in half where that loses
nothing, so what was opened from half precision is saved in half precision, and calibrated scales stay as they are.
What is loaded is checked: files by checksum, the model by fingerprint, each tensor by name, shape and type.

The integers of `DynamicInt8` and of `W8A8("int8")` are the same, so either folder opens on either machine, to the layer
that is the fast one there.

modelopt's `mto.save` stores pickles, and diffusers cannot read back what it saves for compressed models.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_opt import models
from diffusion_opt.datasets import CorruptFileError, verify, write_sums
from diffusion_opt.datasets.writing import write_json, write_tensors
from diffusion_opt.models.call_defaults import save_call_defaults
from diffusion_opt.models.fingerprint import fingerprint
from diffusion_opt.models.opening import AUTO, Dtype, as_dtype, place, settled, stored_dtype
from diffusion_opt.models.zoo import QUANTIZED, forget_origin, locate, open_pipeline
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention, attention_of
from diffusion_opt.quantization.faster.int8_cpu import DynamicInt8Linear
from diffusion_opt.quantization.faster.replacement import EightBitLinear
from diffusion_opt.quantization.faster.w8a8 import W8A8Linear
from diffusion_opt.quantization.formats import Numbers
from diffusion_opt.quantization.packed.packing import OTHERS, PackedFormat, PackedLinear, check_tensors

WEIGHTS = "transformer/packed.safetensors"
VERSION = 1  # of quantization.json
HALF = (torch.float16, torch.bfloat16)
EIGHT_BIT = {"dynamic_int8": ("integers", torch.int8), "dynamic_e4m3": ("codes", torch.float8_e4m3fn)}  # by kind
Packed = PackedLinear | EightBitLinear


def save_quantized(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline with packed layers to a folder that `load` opens.

    Raises ValueError if no layer is packed (call `pack` first) or the folder holds something already.
    """
    folder, transformer = Path(folder), pipe.transformer
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, Packed)}
    if not layers:
        raise ValueError("no layer of this pipeline is packed: call pack(pipe) after PTQ, or save with save_pretrained")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder, so that no file of another model stays in it")
    for name, part in pipe.components.items():
        if part is not None and part is not transformer:
            part.save_pretrained(folder / name)
    transformer.save_config(folder / "transformer")
    pipe.save_config(folder)
    save_call_defaults(pipe, folder)
    forget_origin(folder)
    write_tensors(folder / WEIGHTS, _stored(transformer, layers))
    record = {
        "version": VERSION,
        "model": fingerprint(transformer),
        "attention": None if (attention := attention_of(transformer)) is None else asdict(attention),
        "layers": {name: _describe(layer) for name, layer in layers.items()},
    }
    write_json(folder / QUANTIZED, record)
    write_sums(folder)


def load(
    name: str | Path, *, dtype: Dtype = AUTO, device: str | torch.device = "cpu", offload: str | None = None
) -> DiffusionPipeline:
    """Open a pipeline by shipped name, folder or hub name, packed or not, ready to call; settings as in `models.load`.

    Raises what `models.load` and `load_quantized` raise.
    """
    dtype, folder = as_dtype(dtype), locate(name)
    if (folder / QUANTIZED).is_file() or (folder / WEIGHTS).is_file():
        return load_quantized(folder, dtype=dtype, device=device, offload=offload)
    return models.load(name, dtype=dtype, device=device, offload=offload)


def load_quantized(
    folder: str | Path, *, dtype: Dtype = AUTO, device: str | torch.device = "cpu", offload: str | None = None
) -> DiffusionPipeline:
    """Open what `save_quantized` wrote; on a device of the same kind the output is that of the saved pipeline.

    Raises CorruptFileError if a file is missing, damaged or unreadable, and ValueError if the files do not belong
    together: another model, another format, another shape.
    """
    folder = Path(folder)
    verify(folder)
    device = settled(device)
    dtype = stored_dtype(folder) if dtype == AUTO else as_dtype(dtype)
    record = _read_record(folder)
    transformer = _skeleton(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, FileNotFoundError) as error:
        raise CorruptFileError(f"{folder / WEIGHTS} cannot be read ({error}): save the pipeline again") from error
    on_cpu = device.type == "cpu"
    layers = {name: _restore(transformer, name, entry, tensors, on_cpu) for name, entry in record["layers"].items()}
    _fill(transformer, tensors, set(layers))
    for name, layer in layers.items():
        transformer.set_submodule(name, layer)
    if (found := fingerprint(transformer)) != record["model"]:
        raise ValueError(
            f"{folder / QUANTIZED} is of model {record['model']}, but the weights beside it are of model {found}: "
            "these files do not belong together; save the pipeline again"
        )
    pipe = open_pipeline(folder, dtype, transformer=nn.Module.to(transformer.eval(), dtype))
    pipe = place(pipe, device, offload)
    return pipe if record["attention"] is None else LowPrecisionAttention(**record["attention"]).apply(pipe)


def _stored(transformer: nn.Module, layers: dict[str, Packed]) -> dict[str, Tensor]:
    """Every tensor that has to be saved, by name: those of packed layers and those of all others."""
    found = {}
    for prefix, module in transformer.named_modules():
        layer = layers.get(prefix)
        if isinstance(layer, EightBitLinear):
            own = {EIGHT_BIT[_kind(layer)][0]: _codes(layer), "scales": layer.scales, "bias": layer.bias}
        else:
            passing = module._non_persistent_buffers_set
            own = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in passing}}
        for name, tensor in own.items():
            if tensor is not None:
                exact = layer is not None and name not in OTHERS
                found[f"{prefix}.{name}".lstrip(".")] = tensor.cpu() if exact else _smallest(tensor)
    return found


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in half precision if it is the same there."""
    tensor = tensor.detach().cpu()
    halves = (tensor.to(dtype) for dtype in HALF if tensor.dtype is torch.float32)
    return next((half for half in halves if torch.equal(half.float(), tensor)), tensor).contiguous()


def _describe(layer: Packed) -> dict[str, Any]:
    """What the configuration file says about a layer."""
    if isinstance(layer, PackedLinear):
        return {"kind": "packed", **asdict(layer.format)}
    shape = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.has_bias}
    return {"kind": _kind(layer), **shape}


def _codes(layer: EightBitLinear) -> Tensor:
    return layer.integers() if isinstance(layer, DynamicInt8Linear) else layer.codes


def _kind(layer: EightBitLinear) -> str:
    return next(kind for kind, (_, dtype) in EIGHT_BIT.items() if dtype == _codes(layer).dtype)


def _read_record(folder: Path) -> dict[str, Any]:
    """The configuration file. Raises CorruptFileError unless it is one, and of this version."""
    path = folder / QUANTIZED
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON ({error}): save the pipeline again") from error
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} is missing, and {WEIGHTS} cannot be read without it") from error
    if set(record) != {"version", "model", "attention", "layers"} or record["version"] != VERSION:
        raise CorruptFileError(
            f"{path} is of version {record.get('version')}, this package reads version {VERSION}: save it again"
        )
    return record


def _skeleton(folder: Path) -> nn.Module:
    """The transformer of the folder's configuration, in float and without weights."""
    path = folder / "transformer" / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}): save the pipeline again") from error
    transformer_class = getattr(diffusers, str(config.get("_class_name")), None)
    if transformer_class is None:
        raise ValueError(f"{path} is of class {config.get('_class_name')!r}, which diffusers does not have")
    with init_empty_weights():
        return transformer_class.from_config(config)


def _restore(
    transformer: nn.Module, name: str, entry: dict[str, Any], tensors: dict[str, Tensor], on_cpu: bool
) -> Packed:
    """One packed layer, its tensors taken out of `tensors`. Raises ValueError if these or the model do not fit it."""
    replaced = dict(transformer.named_modules()).get(name)
    shape = tuple(entry.get(key) for key in ("in_features", "out_features", "bias"))
    if not isinstance(replaced, nn.Linear) or shape != _shape(replaced):
        found = f"a linear layer {_shape(replaced)}" if isinstance(replaced, nn.Linear) else "no linear layer"
        raise ValueError(
            f"{QUANTIZED} says that {name} is a linear layer (inputs, outputs, bias) = {shape}, in this transformer "
            f"it is {found}: they belong to different models"
        )
    prefix = f"{name}."
    own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    own = {key: tensor.float() if key in OTHERS else tensor for key, tensor in own.items()}
    try:
        return _layer(entry, own, on_cpu)
    except ValueError as error:
        raise ValueError(f"{name} does not fit its description in {QUANTIZED}: {error}") from error


def _layer(entry: dict[str, Any], tensors: dict[str, Tensor], on_cpu: bool) -> Packed:
    """A layer from its entry in the configuration and its tensors. Raises ValueError if they do not go together."""
    about = {key: value for key, value in entry.items() if key != "kind"}
    if entry.get("kind") in EIGHT_BIT:
        return _eight_bit(entry["kind"], about, tensors, on_cpu)
    if entry.get("kind") != "packed" or set(about) != {field.name for field in fields(PackedFormat)}:
        raise ValueError(f"no kind of layer is described by {sorted(entry.items(), key=str)}")
    numbers = {key: None if about[key] is None else Numbers(**_tuples(about[key])) for key in ("weight", "input")}
    return PackedLinear(PackedFormat(**{**about, **numbers}), tensors)


def _eight_bit(kind: str, about: dict[str, Any], tensors: dict[str, Tensor], on_cpu: bool) -> EightBitLinear:
    rows, columns = about["out_features"], about["in_features"]
    codes, dtype = EIGHT_BIT[kind]
    wanted = {codes: ((rows, columns), dtype), "scales": ((rows,), torch.float32)}
    if about["bias"]:
        wanted["bias"] = ((rows,), torch.float32)
    check_tensors(kind, wanted, tensors)
    cpu_kernel = on_cpu and dtype == torch.int8
    build = DynamicInt8Linear.from_integers if cpu_kernel else W8A8Linear.from_codes
    return build(tensors[codes], tensors["scales"], tensors.get("bias"))


def _tuples(about: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}


def _shape(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def _fill(transformer: nn.Module, tensors: dict[str, Tensor], packed: set[str]) -> None:
    """Give all other layers their tensors. Raises ValueError naming the first that is missing, strange or misshapen."""
    wanted = {n: t for n, t in transformer.state_dict().items() if n.rpartition(".")[0] not in packed}
    for name in sorted({*wanted, *tensors}):
        if name not in tensors or name not in wanted:
            raise ValueError(f"{WEIGHTS} {'lacks' if name in wanted else 'has an unknown'} {name}: of another model?")
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, this transformer wants {tuple(wanted[name].shape)}"
            raise ValueError(f"{name} in {WEIGHTS} has shape {shapes}: they belong to different models")
    transformer.load_state_dict(tensors, strict=False, assign=True)
