"""Look into linear layers: what they are given, and what becomes of the model with other weights.

    x = layer_inputs(layer, run=lambda: pipe("sneaker"))              a row for each token of each pass
    with changed_weights(layers, lambda weight: weight.round()):      the layers as they were before and after
        pipe("sneaker")

The technique `PTQ` changes inputs as well, is calibrated, and takes seconds to put on; here only weights change, which
is enough to see what a number of bits does, and quick enough for a slider.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn


def layer_inputs(layer: nn.Linear, run: Callable[[], object]) -> Float[Tensor, "n i"]:
    """All inputs of a layer while `run` runs. Raises ValueError if nothing went through it."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    try:
        run()
    finally:
        hook.remove()
    if not seen:
        raise ValueError("nothing went through this layer: is it part of what `run` runs?")
    return torch.cat(seen)


@contextmanager
def changed_weights(layers: Iterable[nn.Linear], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, each layer has `change(weight)` in the place of its weight; afterwards the very tensor from before.

    Raises ValueError for a change of shape.
    """
    kept = [(layer, layer.weight.data) for layer in layers]
    try:
        for layer, weight in kept:
            changed = change(weight)
            if changed.shape != weight.shape:
                raise ValueError(f"weights must keep their shape {tuple(weight.shape)}, got {tuple(changed.shape)}")
            layer.weight.data = changed
        yield
    finally:
        for layer, weight in kept:
            layer.weight.data = weight
