"""What a generation takes, before a weight is read: bytes of weights, arithmetic and activations of a pass.

The pipeline is built from its configs on torch's meta device, where tensors have shapes and no content. Its own call is
then made and stopped at the first pass of the denoising network, whose arguments it prepared as it always does, so
sizes, text lengths and packing are the family's own. That pass runs on meta tensors too: torch's `FlopCounterMode`
counts its multiply-accumulates, and a dispatch mode follows which tensors are alive at once. What depends on contents,
such as a scheduler's search for a time, is never reached.
"""

import functools
import importlib
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from diffusion_opt.models.opening import check_code, read_index
from diffusion_opt.models.pipeline import TinyFlux2Pipeline
from diffusion_opt.subjects.networks import denoisers
from diffusion_opt.subjects.run import Run

ENCODERS = (transformers.T5EncoderModel, transformers.UMT5EncoderModel)  # which look whether a mask masks anything


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What one pass of a denoising network takes, for one call's batch."""

    network: str
    macs: int  # multiply-accumulates
    activation_bytes: int  # most bytes of tensors alive at once, weights and inputs aside
    shapes: dict[str, tuple[int, ...]]  # of the tensors it is given
    rows: int  # of its first tensor: more than the batch if guidance is batched into one pass


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of each part's weights in one type, and its first pass."""

    parameters: dict[str, int]
    dtype: torch.dtype
    first: PassPlan
    guided: bool  # whether the call takes guidance, by its own word

    @property
    def weight_bytes(self) -> dict[str, int]:
        return {name: number * self.dtype.itemsize for name, number in self.parameters.items()}

    def passes(self, steps: int, batch_size: int) -> int:
        """Passes of a generation: two a step if guidance is not batched into one; further guidances come on top."""
        apart = self.guided and self.first.rows == batch_size
        return steps * (2 if apart else 1)


def skeleton(folder: Path) -> DiffusionPipeline:
    """The pipeline of a folder on the meta device: its configs and tokenizers, and none of its weights.

    Raises what `models.opening.read_index` and `check_code` raise.
    """
    index = read_index(folder)
    check_code(folder, index)
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2:
            parts[name] = None if value[0] is None else _part(folder, name, *value)
        elif not name.startswith("_"):
            parts[name] = value
    own = index["_class_name"] == TinyFlux2Pipeline.__name__
    kind = TinyFlux2Pipeline if own else getattr(diffusers, index["_class_name"])
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan(pipe: DiffusionPipeline, run: Run, dtype: torch.dtype) -> Plan:
    """The plan of a pipeline on the meta device.

    Raises ValueError if its call looks into tensors before the first pass, so that it cannot be made without contents.
    """
    networks = denoisers(pipe)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}
    name, given = _first_pass(pipe, networks, run)
    first = _pass(name, networks[name], given)
    bytes_there = first.activation_bytes * dtype.itemsize // torch.float32.itemsize
    return Plan(parameters, dtype, replace(first, activation_bytes=bytes_there), _guided(pipe))


class _Reached(Exception):
    """The first pass, with its arguments."""


def _first_pass(pipe: DiffusionPipeline, networks: Mapping[str, nn.Module], run: Run) -> tuple[str, tuple]:
    """Which network computes first, and with which arguments."""

    def stop(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple, settings: dict[str, Any]) -> None:
            raise _Reached(name, arguments, settings)

        return hook

    times = pipe.scheduler.set_timesteps

    @functools.wraps(times)
    def on_cpu(*arguments: Any, **settings: Any) -> None:  # a loop over times asks for their values
        times(*arguments, **{**settings, **({"device": "cpu"} if "device" in settings else {})})

    pipe.scheduler.set_timesteps = on_cpu
    texts = [part for part in pipe.components.values() if isinstance(part, ENCODERS)]
    hooks = [part.register_forward_pre_hook(_without_masks, with_kwargs=True) for part in texts]
    hooks += [net.register_forward_pre_hook(stop(name), with_kwargs=True) for name, net in networks.items()]
    try:
        pipe(**run.call(range(run.batch_size)), output_type="latent")
    except _Reached as reached:
        name, arguments, settings = reached.args
        return name, (arguments, settings)
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{type(pipe).__name__} looks into tensors before its first pass ({first})") from error
    finally:
        del pipe.scheduler.set_timesteps
        for hook in hooks:
            hook.remove()
    raise ValueError(f"{type(pipe).__name__} made no pass of {', '.join(networks)}")


def _without_masks(module: nn.Module, arguments: tuple, settings: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a text encoder without its masks: it would look whether they mask anything."""
    first, others = arguments[:1], arguments[1:]
    kept = tuple(None if isinstance(value, Tensor) else value for value in others)
    return (*first, *kept), {name: None if name == "attention_mask" else value for name, value in settings.items()}


def _pass(name: str, network: nn.Module, given: tuple[tuple, dict[str, Any]]) -> PassPlan:
    arguments, settings = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
    tensors = {key: value for key, value in settings.items() if isinstance(value, Tensor)}
    tensors |= {f"input {place}": value for place, value in enumerate(arguments) if isinstance(value, Tensor)}
    alive = _Alive()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, alive:
        network(*arguments, **settings)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    rows = next((shape[0] for shape in shapes.values() if len(shape) > 1), 1)
    return PassPlan(name, counter.get_total_flops() // 2, alive.peak, shapes, rows)


class _Alive(TorchDispatchMode):
    """Follows the bytes of storages that operations made and that a tensor still refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.referring: Counter[int] = Counter()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor, given)
        return made

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given and key not in self.referring:
            return  # a view of a weight or an input
        if key not in self.referring:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.referring[key] += 1
        weakref.finalize(tensor, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.referring[key] -= 1
        if self.referring[key] == 0:
            del self.referring[key]
            self.now -= size


def _part(folder: Path, name: str, library: str, kind: str) -> Any:
    """One component: networks from their configs on the meta device, everything else as it is stored."""
    root = library.partition(".")[0]
    module = transformers if root == "transformers" else diffusers
    found = getattr(importlib.import_module(library) if root == "diffusion_opt" else module, kind, None)
    if found is None:
        found = getattr(getattr(diffusers.pipelines, library), kind)
    if not issubclass(found, nn.Module):
        return found.from_pretrained(folder / name, local_files_only=True)
    with torch.device("meta"):
        if not issubclass(found, transformers.PreTrainedModel):
            return found.from_config(found.load_config(folder / name, local_files_only=True)).eval()
        config = found.config_class.from_pretrained(folder / name, local_files_only=True)
        config._attn_implementation = "eager"  # the others look whether a mask masks anything
        return found(config).eval()


def _guided(pipe: DiffusionPipeline) -> bool:
    return bool(getattr(pipe, "do_classifier_free_guidance", False))
