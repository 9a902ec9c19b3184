"""Calls on tensors without content that still know what no weight decides: tokens, masks, positions, constants.

A pipeline on torch's meta device costs nothing, but it cannot be called where it looks into tensors: Qwen-Image and
Z-Image cut their prompts to length by a mask (`hidden[mask]`), HunyuanVideo 1.5 sorts its texts by one and asks whether
its picture is all zeros, and others ask whether a mask masks anything. All of that was made by a tokenizer or out of
nothing, and is small. So inside `known_contents()`

    what has contents keeps them, on the CPU, whatever device is asked for, up to `LARGEST` elements
    what comes out of a weight has none
    an operation on both is computed without; a mask that picks rows is turned into their numbers first

and a pass has the shapes that it would have with weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LARGEST = 2**22  # elements of a tensor that keeps its contents; a mask of all pairs of tokens is larger
_aten = torch.ops.aten
_MAKES = {  # operations that make a tensor of nothing, or of another's shape
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.full.default, _aten.full_like.default,
    _aten.ones.default, _aten.ones_like.default, _aten.zeros.default, _aten.zeros_like.default,
    _aten.scalar_tensor.default,
}  # fmt: skip


class known_contents(TorchDispatchMode):
    """Within this block operations on the meta device keep the contents that do not come out of a weight."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function is _aten._to_copy.default:
            return _moved(args[0], kwargs)
        if function in _MAKES:
            return _made(function, args, kwargs)
        if any(tensor.is_meta for tensor in tensors) and not all(tensor.is_meta for tensor in tensors):
            if function is _aten.index.Tensor and args[0].is_meta:
                args = (args[0], _numbers(args[1]))
            args, kwargs = tree_map_only(Tensor, without_contents, (args, kwargs))
        return function(*args, **kwargs)


def keeps(tensor: Tensor) -> bool:
    """Whether a tensor has contents and is small enough to keep them."""
    return not tensor.is_meta and tensor.numel() <= LARGEST


def without_contents(tensor: Tensor) -> Tensor:
    """Its shape, strides and type on the meta device."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _moved(tensor: Tensor, wanted: dict[str, Any]) -> Tensor:
    """A copy in another type or place: contents stay where they are, and cannot come to where none are."""
    stays = keeps(tensor) or (not tensor.is_meta and wanted.get("device") is None)
    return _aten._to_copy.default(tensor, **{**wanted, "device": torch.device("cpu" if stays else "meta")})


def _made(function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A new tensor, with its contents unless it is large and was to have none."""
    like = args[0] if args and isinstance(args[0], Tensor) else None
    device = kwargs.get("device") or (torch.device("cpu") if like is None else like.device)
    made = function(*args, **{**kwargs, "device": torch.device("meta")})
    if torch.device(device).type == "meta" and made.numel() > LARGEST:
        return made
    return function(*args, **{**kwargs, "device": torch.device("cpu")})


def _numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices with each mask that has contents turned into the numbers of its rows."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and not index.is_meta and index.dtype in (torch.bool, torch.uint8):
            found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found
