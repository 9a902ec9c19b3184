"""Adapters as roles: student, fake score and teacher as one frozen network with small additions (LoRA, with PEFT).

Distribution matching holds three networks of the teacher's size, two of them with gradients, moments and an average.
A low-rank adapter (Hu et al. 2021, arXiv 2106.09685, equation 3) adds to each linear layer

    y = W x + (alpha / rank) B A x,        A: in -> rank,  B: rank -> out, zero at first

and W stays frozen. So one network in memory can be all three: the teacher with no adapter, the student with one, the
fake score with another. What is trained, moved, averaged and saved is A and B only. Per layer and adapter that is
rank (in + out) numbers against in x out: with rank 16 and a width of 3072, about 1 %; and each comes with its gradient,
two moments and, for the student, an average. Activations cost what they did, so `checkpoint_blocks` matters more.

    roles = adapters(velocity, ("student", "fake_score"), LoraSettings(rank=16))
    method = DistributionMatching(student=roles["student"], fake_score=roles["fake_score"], teacher=velocity, …)
    student = merged(train(method, …).ema)

PEFT's own switch, `set_adapter`, also marks which adapter is trainable, and whatever is marked frozen when `backward`
comes gets no gradient. Here switching is for the length of one pass and leaves all adapters trainable; whose gradients
are used is the trainer's business. A large base may be sharded (`training.shard`) before adapters are added to it.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_opt.datasets import write_tensors
from diffusion_opt.training.distributed import is_sharded


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Size and places of an adapter."""

    rank: int = 16
    alpha: float | None = None  # scale of the addition, times rank; None: equal to rank, a factor of one
    targets: tuple[str, ...] = ()  # ends of the names of linear layers, such as "to_q"; none: all linear layers

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be positive, got {self.rank}")


class Adapted(nn.Module):
    """The base with one adapter: called like the base, but its parameters are those of the adapter alone.

    They are named as in diffusers' LoRA files (`….to_q.lora_A.weight`). A deep copy has adapter weights of its own and
    shares the base.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self._base = [base]  # in a list, so that the frozen base is no submodule: it is not trained or saved with us
        self.adapter = name
        self._inside = {}  # name here -> name in the base
        for place, parameter in base.named_parameters():
            if f".{name}." in place and ".lora_" in place:
                own = place.replace(f".{name}.", ".")
                self._inside[own] = place
                _register(self, own, parameter)

    @property
    def base(self) -> nn.Module:
        """The frozen network below."""
        return self._base[0]

    @property
    def two_time(self) -> bool:
        """Whether the base knows a second time, as methods ask."""
        return getattr(self.base, "two_time", False)

    def __deepcopy__(self, memo: dict) -> "Adapted":
        memo[id(self.base)] = self.base
        clone = self.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__ = copy.deepcopy(self.__dict__, memo)
        return clone

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        own = {self._inside[name]: parameter for name, parameter in self.named_parameters()}
        with _active(self.base, [self.adapter]):
            return torch.func.functional_call(self.base, own, args, kwargs)


def adapters(
    base: nn.Module, names: Sequence[str], settings: LoraSettings = LoraSettings(), seed: int = 0
) -> dict[str, Adapted]:
    """Freeze `base`, add adapters to it, and give a network for each; `base` itself computes what it did, bit for bit.

    All start as the base (B = 0); A depends on `seed` alone. Adapters are in float32 whatever the base is in: steps of
    training are smaller than what half precision can tell apart. Raises ValueError if the base has adapters already,
    or no layer of the wanted names.
    """
    if _layers(base):
        raise ValueError("this network has adapters already; load it anew, or fold them in with `merged`")
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    places = [name for name in linear if not settings.targets or name.endswith(settings.targets)]
    if not places:
        raise ValueError(f"no linear layer ends with one of {settings.targets}; there are {', '.join(linear[:5])}, …")
    alpha = settings.rank if settings.alpha is None else settings.alpha
    base.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name in names:
            config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=places)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
                inject_adapter_in_model(config, base, adapter_name=name)
    for layer in _layers(base).values():
        for part in layer.adapter_layer_names:
            getattr(layer, part).float()
    _switch(base, [])
    return {name: Adapted(base, name) for name in names}


def merged(adapted: Adapted) -> nn.Module:
    """A copy of the base with the adapter folded in, W + (alpha / rank) B A: an ordinary network again.

    Raises ValueError if the base is sharded, since such a network cannot be copied.
    """
    if is_sharded(adapted.base):
        raise ValueError("the base is sharded over processes; save the adapter, and merge it in a process of its own")
    network = copy.deepcopy(adapted.base)
    places = dict(network.named_parameters())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            places[adapted._inside[name]].copy_(parameter)
    for layer in _layers(network).values():
        layer.merge(safe_merge=True, adapter_names=[adapted.adapter])
    return without_adapters(network).requires_grad_(False)


def without_adapters(network: nn.Module) -> nn.Module:
    """The network with its adapters taken out again, in place: what it was before `adapters`, bit for bit."""
    for name, layer in _layers(network).items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer.get_base_layer())
    return network


def save_lora(adapted: Adapted, folder: Path) -> None:
    """The adapter as a file that a pipeline's `load_lora_weights(folder)` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "pytorch_lora_weights.safetensors", {n: t.cpu() for n, t in adapted.state_dict().items()})


def checkpoint_blocks(transformer: ModelMixin) -> None:
    """Gradient checkpointing that computes a block again with the adapter it had the first time.

    diffusers' own would compute it again during `backward`, when no adapter is active any more, and torch stops there
    with an error. Raises ValueError for a class that does not support checkpointing.
    """

    def again(block: nn.Module, *args: object) -> object:
        before = next(iter(_layers(block).values())).active_adapters if _layers(block) else []

        def contexts() -> tuple:
            return nullcontext(), _active(block, before)

        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=contexts)

    transformer.enable_gradient_checkpointing(again)


def _layers(network: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def _switch(network: nn.Module, names: list[str]) -> None:
    for layer in _layers(network).values():
        layer.set_adapter(names)
        for part in layer.adapter_layer_names:
            getattr(layer, part).requires_grad_(True)


@contextmanager
def _active(network: nn.Module, names: list[str]) -> Iterator[None]:
    """These adapters in this block; afterwards those that were active before."""
    layers = _layers(network)
    before = next(iter(layers.values())).active_adapters if layers else []
    _switch(network, names)
    try:
        yield
    finally:
        _switch(network, before)


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a name with dots, through empty modules."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    module.register_parameter(leaf, parameter)
