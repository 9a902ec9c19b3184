"""Which model a set of weights is: what every store, checkpoint, plan, calibration and packed folder belongs to.

What is calibrated, searched, distilled or packed holds for one set of weights and fails silently on others. So it is
stored with the `Identity` of its model, which is compared with the one at hand:

    weights     class, configuration, and every parameter and persistent buffer of the network, blocks included
    adapters    the LoRA adapters that are active, with their scales and weights; loaded but inactive ones do not count
    changes     what techniques did to the layers since (quantized, packed, …); not part of `model`

Values are compared after a cast to bfloat16, so one stored checkpoint is the same model opened in float32 or bfloat16,
and one stored in float16 also in float16. (A float32 checkpoint that was rounded to float16 is another one: rounding
twice does not give what rounding once gives.)

All tensors take part in full, and it stays fast on large models: of a tensor only two short vectors are hashed, which
the device that holds it computes in one pass. One is a strided sample of its bit patterns, which knows their order. The
other are sums of these patterns, read as 64-bit integers, over positions that are equal modulo 1,009: exact whatever
the order of summation, and changed by any change of a single number. (On one core of a CPU about 0.15 s for 100 million
weights in bfloat16.) No block stack is needed, so any family has an identity.

A technique that replaces layers leaves nothing that could be compared. It does so inside `with same_model(network,
"int8"):`, and the instance remembers what it was. The memory holds as long as the layers stay as the technique left
them: weights loaded or fused afterwards, or the technique taken off, are noticed, because what is there is hashed too.

`fingerprint` is older and looks at what lies outside the blocks only; packed folders check their remainder by it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffusion_opt.models.block_stack import block_stack

SAMPLES = 4096  # of a tensor's numbers, evenly spread
RESIDUES = 1009  # a prime: rows of a matrix do not fall on the same positions
CHUNK = 8 * RESIDUES * 2**11  # elements that are cast at a time
_MEMORY = "_identity_before_techniques"
_FUSED = ("to_qkv", "to_kv", "to_added_qkv")  # copies that diffusers' fuse_qkv_projections makes beside the originals


@dataclass(frozen=True, slots=True)
class Identity:
    """What a network is; `model` is what stores and calibrations compare."""

    weights: str  # 16 hex digits: class, configuration, and the weights as they were before techniques
    adapters: tuple[str, ...] = ()  # active ones: "name x scale (digest)", sorted
    changes: tuple[str, ...] = ()  # what techniques did to the layers, in order

    @property
    def model(self) -> str:
        """16 hex digits of weights and active adapters; the names of adapters do not count."""
        if not self.adapters:
            return self.weights
        nameless = sorted(adapter.partition(" x ")[2] for adapter in self.adapters)
        return _digest(self.weights, *nameless)

    def describe(self) -> str:
        """The identity in words, for messages."""
        parts = [self.weights]
        if self.adapters:
            parts.append("with LoRA " + ", ".join(self.adapters))
        if self.changes:
            parts.append("after " + ", ".join(self.changes))
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a network was, and the digest of what techniques left of it."""

    source: Identity
    left: str


def identity(networks: nn.Module | Mapping[str, nn.Module]) -> Identity:
    """The identity of a network, or of all denoisers of a pipeline together (`subjects.denoisers(pipe)`).

    Several networks have the digest of their digests; one in a mapping is that network. Raises ValueError for weights
    without numbers (the meta device).
    """
    if isinstance(networks, nn.Module):
        return _identity(networks)
    found = {name: _identity(network) for name, network in networks.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    parts = (f"{name}={one.weights}" for name, one in found.items())
    adapters = tuple(f"{name}.{adapter}" for name, one in found.items() for adapter in one.adapters)
    changes = tuple(f"{name}: {change}" for name, one in found.items() for change in one.changes)
    return Identity(_digest(*parts), adapters, changes)


@contextmanager
def same_model(network: nn.Module, change: str) -> Iterator[None]:
    """During this block a technique rewrites layers; the network stays the same model, with one more `change`."""
    before = identity(network)
    yield
    remember(network, before, change)


def remember(network: nn.Module, source: Identity, change: str) -> None:
    """From here on, as long as its layers stay as they are, this network is `source` after `change`.

    For what cannot say itself what it was: a network opened from a folder of packed weights.
    """
    known = Identity(source.weights, (), (*source.changes, change))
    setattr(network, _MEMORY, _Memory(known, _content(network)))


def forget(network: nn.Module) -> None:
    """The technique was taken off: the network is again what its weights say."""
    vars(network).pop(_MEMORY, None)


def scheduler_fingerprint(scheduler: SchedulerMixin) -> str:
    """16 hex digits of a scheduler's class and configuration: the same weights make other pictures on other times."""
    return _digest(type(scheduler).__name__, _config(scheduler.config))


def fingerprint(transformer: nn.Module) -> str:
    """16 hex digits of a transformer's class, its configuration and the parameters outside its blocks.

    Unlike `identity` it does not see the blocks, nor LoRA on them, and depends on the precision.
    """
    digest = hashlib.sha256(transformer.__class__.__name__.encode())
    digest.update(_config(transformer.config).encode())
    inside = {id(parameter) for block in block_stack(transformer).blocks for parameter in block.parameters()}
    for name, weight in sorted(transformer.named_parameters()):
        if id(weight) not in inside:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _identity(network: nn.Module) -> Identity:
    content, memory = _content(network), getattr(network, _MEMORY, None)
    source = memory.source if memory is not None and memory.left == content else Identity(content)
    return Identity(source.weights, _adapters(network), source.changes)


def _content(network: nn.Module) -> str:
    """Digest of class, configuration, parameters and persistent buffers, without adapters."""
    kind = getattr(network, "_orig_mod", network)  # a compiled module stands around the one that is meant
    digest = hashlib.sha256(type(kind).__name__.encode())
    digest.update(_config(getattr(kind, "config", None) or {}).encode())
    for name, tensor in sorted(_tensors(network).items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_content_of(tensor))
    return digest.hexdigest()[:16]


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the names they have without adapters, compilation and fused copies."""
    found: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        passing = module._non_persistent_buffers_set
        own = dict(module._parameters) | {n: b for n, b in module._buffers.items() if n not in passing}
        if not own or _is_adapter(path) or path.rpartition(".")[2] in _FUSED:
            continue
        plain = ".".join(part for part in path.split(".") if part not in ("base_layer", "_orig_mod", ""))
        for name, tensor in own.items():
            if tensor is not None:
                found[f"{plain}.{name}".lstrip(".")] = _on_hand(module, name, tensor)
    return found


def _is_adapter(path: str) -> bool:
    return any(part.startswith("lora_") for part in path.split("."))


def _on_hand(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or what accelerate's offloading keeps elsewhere while the module holds a place for it."""
    if tensor.device.type != "meta":
        return tensor
    stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if stored is None:
        raise ValueError(f"{name} of {type(module).__name__} is on the meta device: a network without weights is none")
    return stored[name]


@torch.no_grad()
def _content_of(tensor: Tensor) -> bytes:
    """Sample and sums of a tensor's bfloat16 patterns; integers and 8-bit floats by their own."""
    if hasattr(tensor, "to_local"):
        raise ValueError("a sharded network has no identity of its own: take it before the network is sharded")
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLES)
    parts = [_patterns(flat[::stride].contiguous())]
    if stride > 1:
        sums = torch.zeros(RESIDUES, dtype=torch.int64, device=flat.device)
        for chunk in flat.split(CHUNK):
            words = _words(_patterns(chunk))
            whole = len(words) // RESIDUES * RESIDUES
            sums += words[:whole].view(-1, RESIDUES).sum(0)
            sums[: len(words) - whole] += words[whole:]
        parts.append(sums)
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _patterns(flat: Tensor) -> Tensor:
    """The bytes of numbers; those of floats of 16 bits and more after a cast to bfloat16."""
    if flat.is_floating_point() and flat.element_size() >= 2:
        flat = flat.to(torch.bfloat16)
    return flat.contiguous().view(torch.uint8)


def _words(patterns: Tensor) -> Tensor:
    """Bytes as 64-bit integers, the last one filled up with zeros."""
    return nn.functional.pad(patterns, (0, -len(patterns) % 8)).view(torch.int64)


def _adapters(network: nn.Module) -> tuple[str, ...]:
    """The LoRA adapters that change the output, each with its scale and a digest of its weights."""
    scales: dict[str, set[float]] = {}
    digests: dict[str, Any] = {}
    for path, layer in sorted(network.named_modules(), key=lambda item: item[0]):
        if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
            continue
        for name in layer.active_adapters:
            if layer.scaling.get(name, 0) == 0:
                continue
            scales.setdefault(name, set()).add(float(layer.scaling[name]))
            digest = digests.setdefault(name, hashlib.sha256())
            digest.update(f"{path} {layer.scaling[name]!r}".encode())
            for part in layer.adapter_layer_names:
                weights = getattr(layer, part)
                if name in weights:
                    for weight in [weights[name]] if isinstance(weights[name], Tensor) else weights[name].parameters():
                        digest.update(_content_of(weight))
    return tuple(
        f"{name} x {'/'.join(f'{scale:g}' for scale in sorted(scales[name]))} ({digests[name].hexdigest()[:8]})"
        for name in sorted(scales)
    )


def _config(config: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True, default=str)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
