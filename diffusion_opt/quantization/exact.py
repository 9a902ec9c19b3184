"""Codes, scales and ranges move with a model and are never cast with it.

`pipe.to(torch.bfloat16)`, `load(folder, dtype=…)` and layerwise casting all end in `nn.Module._apply`, which casts
every buffer. A weight in another type is the same weight, a little rounded. A code in another type is another number,
and a scale that lost 16 bits shifts a whole channel by up to 0.4 %. So what must stay exact is put back after each
cast, on the device that the module has now.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn


def apply_keeping(module: nn.Module, exact: Iterable[str], fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """`module._apply(fn, recurse)`, after which the named buffers have the type they had."""
    before = {name: getattr(module, name, None) for name in exact}
    nn.Module._apply(module, fn, recurse)
    for name, tensor in before.items():
        if tensor is not None and getattr(module, name).dtype != tensor.dtype:
            setattr(module, name, tensor.to(getattr(module, name).device))
