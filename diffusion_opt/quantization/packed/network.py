"""One network with packed layers as a file of tensors and a description, and back.

    transformer/packed.safetensors      codes and scales, and what was not quantized
    the description (in JSON)           "layers": each packed layer's kind, shape and format
                                        "model", "changes": the identity of the float network, and what became of it
                                        "types": of tensors that are not in the network's own type

Tensors in single precision are stored in half where that loses nothing, so what was opened from half precision is saved
in half precision. Opened in its own type a network has every tensor in the type it had; opened in another one, what is
computed with is cast, except for modules that the class keeps in float32. Codes, scales and ranges are never cast.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.datasets.writing import read_json, write_tensors
from diffusion_opt.models.fingerprint import Identity, fingerprint, identity, remember
from diffusion_opt.quantization.faster.int8_cpu import DynamicInt8Linear
from diffusion_opt.quantization.faster.replacement import EightBitLinear
from diffusion_opt.quantization.faster.w8a8 import KINDS, TYPES, W8A8Linear
from diffusion_opt.quantization.formats import Numbers
from diffusion_opt.quantization.guards import EIGHT_BIT, PACKED, close_doors
from diffusion_opt.quantization.packed.packing import OTHERS, PackedFormat, PackedLinear, check_tensors

FILE = "packed.safetensors"
HALF = (torch.float16, torch.bfloat16)
CODES = {f"dynamic_{numbers}": dtype for numbers, dtype in TYPES.items()}  # the type of codes by kind of 8-bit layer
Packed = PackedLinear | EightBitLinear


def packed_layers(network: nn.Module) -> dict[str, Packed]:
    """The layers of a network that hold codes in place of weights, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Packed)}


def main_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type of most numbers among tensors that are computed with; float32 if there are none."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__, default=torch.float32)


def save_network(network: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the tensors and the configuration of a network to a folder; returns the description."""
    layers, known = packed_layers(network), identity(network)
    network.save_config(folder)
    write_tensors(folder / FILE, _stored(network, layers), {"model": known.weights})
    computed = dict(_computed(network, layers))
    own = main_type(computed.values())
    return {
        "model": known.weights,
        "changes": list(known.changes) or ["packed"],
        "dtype": _name(own),
        "types": {name: _name(t.dtype) for name, t in computed.items() if t.dtype != own and t.is_floating_point()},
        "layers": {name: _describe(layer) for name, layer in layers.items()},
    }


def load_network(folder: Path, about: Mapping[str, Any], dtype: torch.dtype | None, on_cpu: bool) -> nn.Module:
    """Open what `save_network` wrote, in a type (None: each tensor in its own), on the CPU.

    `on_cpu` says whether it will compute there. Raises CorruptFileError for files that cannot be read, ValueError if
    files and description do not belong together.
    """
    network = _skeleton(folder)
    tensors, written_for = _read(folder / FILE)
    if "dtype" in about and written_for != about["model"]:
        raise ValueError(_strangers(folder, about["model"], written_for))
    types = {**about.get("types", {}), "": about.get("dtype", "float32")} if dtype is None else {"": _name(dtype)}
    cpu_kernel = on_cpu and types[""] == "float32"
    layers = {n: _restore(network, n, entry, tensors, cpu_kernel) for n, entry in about["layers"].items()}
    _fill(network, tensors, set(layers))
    for name, layer in layers.items():
        network.set_submodule(name, layer)
    if "dtype" not in about and (found := fingerprint(network)) != about["model"]:  # as version 1 was checked
        raise ValueError(_strangers(folder, about["model"], found))
    _cast(network, layers, types, exact=dtype is None)
    if "changes" in about:
        *before, last = about["changes"]
        remember(network, Identity(about["model"], (), tuple(before)), last)
    close_doors(network, EIGHT_BIT if any(isinstance(layer, EightBitLinear) for layer in layers.values()) else PACKED)
    return network.eval()


def _strangers(folder: Path, wanted: str, found: str | None) -> str:
    return (
        f"{folder} describes model {wanted}, but the weights beside it are of model {found}: these "
        "files do not belong together; save the pipeline again"
    )


def _read(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, and the model it was written for. Raises CorruptFileError if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, (opened.metadata() or {}).get("model")  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise CorruptFileError(f"{file} cannot be read ({error}): save the pipeline again") from error


def _computed(network: nn.Module, layers: Mapping[str, Packed]) -> Iterable[tuple[str, Tensor]]:
    """Every saved tensor that is computed with as it is, by name: not codes, scales and ranges."""
    for prefix, module in network.named_modules():
        for name, tensor in _own(module).items():
            if tensor is not None and (prefix not in layers or name in OTHERS):
                yield f"{prefix}.{name}".lstrip("."), tensor


def _own(module: nn.Module) -> dict[str, Tensor | None]:
    """The tensors that a module itself holds and that are saved."""
    if isinstance(module, EightBitLinear):
        return module.stored()
    passing = module._non_persistent_buffers_set
    return {**module._parameters, **{name: b for name, b in module._buffers.items() if name not in passing}}


def _stored(network: nn.Module, layers: Mapping[str, Packed]) -> dict[str, Tensor]:
    """Every tensor that has to be saved, by name: those of packed layers and those of all others."""
    found = {}
    for prefix, module in network.named_modules():
        for name, tensor in _own(module).items():
            if tensor is not None:
                exact = prefix in layers and name not in OTHERS
                found[f"{prefix}.{name}".lstrip(".")] = tensor.detach().cpu() if exact else _smallest(tensor)
    return found


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in half precision if it is the same there."""
    tensor = tensor.detach().cpu()
    halves = (tensor.to(dtype) for dtype in HALF if tensor.dtype is torch.float32)
    return next((half for half in halves if torch.equal(half.float(), tensor)), tensor).contiguous()


def _describe(layer: Packed) -> dict[str, Any]:
    """What the description says about a layer."""
    if isinstance(layer, PackedLinear):
        return {"kind": "packed", **asdict(layer.format)}
    shape = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.has_bias}
    return {"kind": layer.kind, **shape}


def _skeleton(folder: Path) -> nn.Module:
    """The network of the folder's configuration, in float and without weights."""
    path = folder / "config.json"
    config = read_json(path, "save the pipeline again")
    network_class = getattr(diffusers, str(config.get("_class_name")), None)
    if network_class is None:
        raise ValueError(f"{path} is of class {config.get('_class_name')!r}, which diffusers does not have")
    with init_empty_weights():
        return network_class.from_config(config)


def _restore(
    network: nn.Module, name: str, entry: dict[str, Any], tensors: dict[str, Tensor], cpu_kernel: bool
) -> Packed:
    """One packed layer, its tensors taken out of `tensors`. Raises ValueError if these or the model do not fit it."""
    replaced = dict(network.named_modules()).get(name)
    shape = tuple(entry.get(key) for key in ("in_features", "out_features", "bias"))
    if not isinstance(replaced, nn.Linear) or shape != _shape(replaced):
        found = f"a linear layer {_shape(replaced)}" if isinstance(replaced, nn.Linear) else "no linear layer"
        raise ValueError(
            f"{name} was saved as a linear layer (inputs, outputs, bias) = {shape}, in this transformer it is {found}: "
            "they belong to different models"
        )
    prefix = f"{name}."
    own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    own = {key: tensor.float() if key in OTHERS else tensor for key, tensor in own.items()}
    try:
        return _layer(entry, own, cpu_kernel)
    except ValueError as error:
        raise ValueError(f"{name} does not fit its description: {error}") from error


def _layer(entry: dict[str, Any], tensors: dict[str, Tensor], cpu_kernel: bool) -> Packed:
    """A layer from its entry in the description and its tensors. Raises ValueError if they do not go together."""
    about = {key: value for key, value in entry.items() if key != "kind"}
    if entry.get("kind") in CODES:
        return _eight_bit(entry["kind"], about, tensors, cpu_kernel)
    if entry.get("kind") != "packed" or set(about) != {field.name for field in fields(PackedFormat)}:
        raise ValueError(f"no kind of layer is described by {sorted(entry.items(), key=str)}")
    numbers = {key: None if about[key] is None else Numbers(**_tuples(about[key])) for key in ("weight", "input")}
    return PackedLinear(PackedFormat(**{**about, **numbers}), tensors)


def _eight_bit(kind: str, about: dict[str, Any], tensors: dict[str, Tensor], cpu_kernel: bool) -> EightBitLinear:
    """To the layer that is the fast one where it will compute; a CPU's integer kernels take float32 alone."""
    rows, columns = about["out_features"], about["in_features"]
    codes, dtype = KINDS[kind], CODES[kind]
    wanted = {codes: ((rows, columns), dtype), "scales": ((rows,), torch.float32)}
    if about["bias"]:
        wanted["bias"] = ((rows,), torch.float32)
    check_tensors(kind, wanted, tensors)
    build = DynamicInt8Linear.from_integers if cpu_kernel and dtype == torch.int8 else W8A8Linear.from_codes
    return build(tensors[codes], tensors["scales"], tensors.get("bias"))


def _tuples(about: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}


def _shape(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def _fill(network: nn.Module, tensors: dict[str, Tensor], packed: set[str]) -> None:
    """Give all other layers their tensors. Raises ValueError naming the first that is missing, strange or misshapen."""
    wanted = {n: t for n, t in network.state_dict().items() if n.rpartition(".")[0] not in packed}
    for name in sorted({*wanted, *tensors}):
        if name not in tensors or name not in wanted:
            raise ValueError(f"{FILE} {'lacks' if name in wanted else 'has an unknown'} {name}: of another model?")
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, this transformer wants {tuple(wanted[name].shape)}"
            raise ValueError(f"{name} in {FILE} has shape {shapes}: they belong to different models")
    network.load_state_dict(tensors, strict=False, assign=True)


def _cast(network: nn.Module, layers: Mapping[str, Packed], types: Mapping[str, str], exact: bool) -> None:
    """Give every tensor that is computed with its type: the one named for it, else the one under ""."""
    kept = () if exact else tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in list(_computed(network, layers)):
        if not tensor.is_floating_point():
            continue
        in_float32 = any(part in kept for part in name.split("."))
        dtype = getattr(torch, "float32" if in_float32 else types.get(name, types[""]))
        path, _, last = name.rpartition(".")
        module = network.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(dtype)
        else:
            setattr(module, last, tensor.to(dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
