"""How much memory a run needs on each process, before anything is loaded.

    weights      all parameters and buffers                        sharded: this process's rows of each
    gradients    of what is trained, as large as its weights       sharded likewise
    moments      two of AdamW for each trained number, and a step count of 4 bytes for each tensor
    average      a copy of the first role's network
    gathered     the whole weights of a sharded network's root and of the two largest blocks (one computes, the next is
                 on its way); of a replicated one in several processes, the message of its gradients
    activations  what autograd keeps between forward and backward

Networks may be built on torch's meta device: shapes without numbers. Activations are no formula either: the loss is
computed once with fake tensors (`fake_weights`), and autograd is asked what it would keep. With gradient checkpointing
that is the input of each block, and all of one block at a time. Not in the sum: temporary buffers inside
operations, other kernels than the CPU's, what the allocator cannot use, text encoder and decoder (encode first, decode
after). Take the result as a lower bound and leave room.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from diffusion_opt.training.distributed import blocks_of

GIBIBYTE = 2**30
Storages = dict[int, torch.UntypedStorage]  # by address; held, so that none is freed and its address given again


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one network (or, in `activations`, one step) takes on each process."""

    name: str
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    average: int = 0
    gathered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Sum in bytes."""
        return self.weights + self.gradients + self.moments + self.average + self.gathered + self.activations


def need_of_role(name: str, network: nn.Module, world_size: int, averaged: bool, sharded: bool = False) -> Need:
    """What a network in training takes; `averaged` for the first role of a method."""
    sharded = sharded and world_size > 1
    trained = [p for p in network.parameters() if p.requires_grad]
    weights = _held(_tensors(network), world_size if sharded else 1)
    gradients = _held(trained, world_size if sharded else 1)
    message = sum(_bytes(p) for p in trained) if world_size > 1 else 0
    return Need(
        name,
        weights=weights,
        gradients=gradients,
        moments=2 * gradients + 4 * len(trained),
        average=weights if averaged else 0,
        gathered=_gathered(network) if sharded else message,
    )


def need_of_frozen(name: str, network: nn.Module, world_size: int, sharded: bool = False) -> Need:
    """What a network takes that is only computed with."""
    sharded = sharded and world_size > 1
    weights = _held(_tensors(network), world_size if sharded else 1)
    return Need(name, weights=weights, gathered=_gathered(network) if sharded else 0)


def fake_weights(*networks: nn.Module) -> None:
    """Replace the weights of networks on the meta device by fake ones on the CPU; call it under `FakeTensorMode`.

    On the meta device itself torch would take other kernels: attention with all its scores, for one. A parameter that
    several modules share is shared afterwards.
    """
    fakes: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, which keeps its id from being given again
    for module in (module for network in networks for module in network.modules()):
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if kind is module._parameters:
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = tensor, fake
                kind[name] = fakes[id(tensor)][1]


def kept_for_backward(loss: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that autograd keeps after `loss()`, without the network's own weights."""
    return _size(_kept(loss, network)[1])


def kept_with_checkpointing(loss: Callable[[], Tensor], network: nn.Module, transformer: ModelMixin) -> int:
    """The same with gradient checkpointing of the transformer's blocks: their inputs, and all of the largest block.

    The transformer's checkpointing is switched on for the call and off after it.
    """
    inputs: Storages = {}
    inside: list[int] = []

    def watched(block: nn.Module, *args: object) -> object:
        inputs.update({_storage(a): a.untyped_storage() for a in args if isinstance(a, Tensor)})
        output, kept = _kept(lambda: block(*args), network)
        inside.append(_size(kept))
        return output

    transformer.enable_gradient_checkpointing(watched)
    try:
        _, outside = _kept(loss, network)
    finally:
        transformer.disable_gradient_checkpointing()
    return _size(inputs | outside) + max(inside, default=0)


def table(needs: Iterable[Need]) -> str:
    """The needs in GiB, a row each, with their sum."""
    columns = ("weights", "gradients", "moments", "average", "gathered", "activations", "total")
    rows = [(need.name, [getattr(need, column) / GIBIBYTE for column in columns]) for need in needs]
    rows.append(("sum", [sum(row[1][i] for row in rows) for i in range(len(columns))]))
    width = max(len("GiB per process"), *(len(name) for name, _ in rows))
    lines = ["GiB per process".ljust(width) + "".join(f"{column:>13}" for column in columns)]
    lines += [name.ljust(width) + "".join(f"{value:13.2f}" for value in values) for name, values in rows]
    return "\n".join(lines)


def _kept(compute: Callable[[], object], network: nn.Module) -> tuple[object, Storages]:
    """The result, and the storages that autograd keeps for it."""
    own = {_storage(tensor) for tensor in _tensors(network)}
    kept: Storages = {}

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return compute(), kept


def _size(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held(tensors: Iterable[Tensor], parts: int) -> int:
    """Bytes on the first process when parameters are cut along their rows into `parts`; buffers never are."""
    held = 0
    for tensor in tensors:
        rows = tensor.shape[0] if tensor.ndim else 1
        share = math.ceil(rows / parts) / max(rows, 1) if isinstance(tensor, nn.Parameter) else 1
        held += round(_bytes(tensor) * share)
    return held


def _gathered(network: nn.Module) -> int:
    blocks = [sum(_bytes(p) for p in block.parameters()) for block in blocks_of(network)]
    root = sum(_bytes(p) for p in network.parameters()) - sum(blocks)
    return root + sum(sorted(blocks)[-2:])
