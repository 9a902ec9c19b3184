"""What a network was when something of it was kept, so that a change is noticed before that is used again.

Between two generations a user may load, scale, disable, fuse or unload an adapter, cast the network, load other
weights, replace layers, or choose another attention backend. None of this tells anybody. `NetworkState` is a snapshot
that is cheap enough for the start of every generation, because it looks at no number of a weight:

    tensors     each parameter and buffer: the object, its version counter, type, and the memory it lies in
    settings    whatever plain values a module holds (flags, numbers, names, and lists of such): of LoRA layers the
                active adapters and their scales, of quantizers whether they are on
    attention   the processors, and the plain values that they hold, among them the backend

Two snapshots that are equal are of the same network; a change back and forth counts as a change. While accelerate or
diffusers moves weights between devices their place in memory says nothing and is left out.
"""

import weakref
from collections.abc import Iterator
from enum import Enum
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, str, bytes, type(None), Enum)
OWN = {"training", "_forward_hooks_with_kwargs", "forward", "_diffusers_hook", "_hf_hook", "_old_forward"}
MOVERS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading", "layerwise_casting")


class NetworkState:
    """A snapshot of one network; equal to another that was taken while nothing changed."""

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.named_modules(remove_duplicate=False))
        moved = any(_is_moved(module) for _, module in modules)
        self._entries = [entry for path, module in modules for entry in _entries(path, module, moved)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NetworkState) and self._entries == other._entries

    __hash__ = None


def _entries(path: str, module: nn.Module, moved: bool) -> Iterator[tuple]:
    yield path, weakref.ref(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield path, name, _Same(tensor), _version(tensor), tensor.dtype, 0 if moved else _place(tensor)
    for name, value in vars(module).items():
        if name in OWN or name in nn.Module.__annotations__ or name.startswith("_identity"):
            continue
        if (settled := _plain(value)) is not NotImplemented:
            yield path, name, settled
    processor = vars(module).get("processor")
    if processor is not None:
        yield path, "processor", _Same(processor), _plain(vars(processor) if hasattr(processor, "__dict__") else {})


class _Same:
    """Equal for the same object only; a tensor compares its numbers otherwise. Weak where it can be."""

    __slots__ = ("_get",)

    def __init__(self, value: Any) -> None:
        try:
            self._get = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        mine = self._get()
        return isinstance(other, _Same) and mine is not None and mine is other._get()

    __hash__ = None


def _plain(value: Any) -> Any:
    """A value that compares by what it says, lists and dictionaries of such too; NotImplemented for anything else."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := _plain(item)) is not NotImplemented}
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(kept for item in value if (kept := _plain(item)) is not NotImplemented)
    return NotImplemented


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> int:
    """Where its numbers lie; 0 for tensors without memory of their own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _is_moved(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (registry is not None and any(name in MOVERS for name in registry.hooks))
