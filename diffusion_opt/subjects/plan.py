"""What a generation takes, before a weight is read: bytes of weights, arithmetic and activations of its passes.

The pipeline is built from its configs on torch's meta device, where tensors have shapes and no content, and its own
call is made in full, so sizes, text lengths, packing and the passes of each step are the family's own. Tokens, masks
and times keep their contents (`contents.py`), because pipelines go by them. Of passes that are given the same shapes
one is computed: torch's `FlopCounterMode` counts its multiply-accumulates, a dispatch mode follows which tensors are
alive at once, and its output stands for those of the others.
"""

import functools
import importlib
import inspect
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from diffusion_opt.models.block_stack import FAMILIES, block_stack
from diffusion_opt.models.opening import check_code, read_index
from diffusion_opt.models.pipeline import TinyFlux2Pipeline
from diffusion_opt.subjects.contents import keeps, known_contents, without_contents
from diffusion_opt.subjects.networks import denoisers
from diffusion_opt.subjects.run import Run

_ATTENTION = re.compile(r"attention|bmm")  # operators of scores and values: fused ones, and the two products apart


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What one pass of a denoising network takes, for one call's batch, and how many such passes there are."""

    network: str
    macs: int  # multiply-accumulates
    activation_bytes: int  # most bytes of tensors alive at once, weights and inputs aside
    shapes: dict[str, tuple[int, ...]]  # of the tensors it is given
    streams: dict[str, tuple[int, ...]]  # through its blocks: samples, tokens, width; none of an unknown class
    count: int = 1  # passes of this kind in a generation
    attention_macs: int = 0  # of `macs`, those of scores and values


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of each part's weights in one type, and the passes of a generation by kind, in the order they come in."""

    parameters: dict[str, int]
    dtype: torch.dtype
    steps: int  # that the scheduler takes
    passes: tuple[PassPlan, ...]

    @property
    def weight_bytes(self) -> dict[str, int]:
        return {name: number * self.dtype.itemsize for name, number in self.parameters.items()}

    @property
    def first(self) -> PassPlan:
        return self.passes[0]

    @property
    def num_passes(self) -> int:
        """Of all networks: guidance in a pass of its own and further guidances included."""
        return sum(one.count for one in self.passes)

    @property
    def anchor_bytes(self) -> int:
        """What a step cache keeps of one step: its streams, of every pass of the step."""
        numbers = sum(one.count * math.prod(shape) for one in self.passes for shape in one.streams.values())
        return numbers * self.dtype.itemsize // self.steps

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all passes."""
        return sum(one.count * one.macs for one in self.passes)


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
    """The plan of a pipeline on the meta device: of one call with a batch of the run.

    Raises ValueError if its call looks into tensors that only weights fill, so that it cannot be made without them.
    """
    networks = denoisers(pipe)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}
    steps, counted = _counted(pipe, networks, run)
    width = dtype.itemsize / torch.float32.itemsize
    passes = [replace(one, activation_bytes=round(width * one.activation_bytes)) for one in counted]
    return Plan(parameters, dtype, steps, tuple(passes))


def _counted(pipe: DiffusionPipeline, networks: Mapping[str, nn.Module], run: Run) -> tuple[int, list[PassPlan]]:
    """The steps of one call, and its passes by kind."""
    found: dict[str, tuple[PassPlan, Any]] = {}
    for name, network in networks.items():
        network.forward = _counting(name, network, found)
    try:
        with known_contents(), _stepping(pipe.scheduler) as steps:
            pipe(**run.call(range(run.batch_size)), output_type="latent")
    except (RuntimeError, NotImplementedError) as error:
        where = f"after {sum(one.count for one, _ in found.values())} passes" if found else "before its first pass"
        raise ValueError(
            f"{type(pipe).__name__} looks into tensors {where}, and without weights they have no content "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        for network in networks.values():
            del network.forward
    if not found or not steps:
        raise ValueError(f"{type(pipe).__name__} made {len(steps)} steps and no pass of {', '.join(networks)}")
    return len(steps), [one for one, _ in found.values()]


@contextmanager
def _stepping(scheduler: SchedulerMixin) -> Iterator[list[int]]:
    """The steps that a scheduler takes in this block, and not its copies; times are on the CPU, where loops read them.

    The class is exchanged, not the methods of the instance, because LTX-2 copies its scheduler for the sound.
    """
    taken: list[int] = []
    own = type(scheduler)

    @functools.wraps(own.set_timesteps)
    def set_timesteps(self: SchedulerMixin, *arguments: Any, **settings: Any) -> None:
        on_cpu = {"device": "cpu"} if "device" in settings else {}
        own.set_timesteps(self, *arguments, **(settings | on_cpu))

    @functools.wraps(own.step)
    def step(self: SchedulerMixin, *arguments: Any, **settings: Any) -> Any:
        if self is scheduler:
            taken.append(len(taken))
        return own.step(self, *arguments, **settings)

    scheduler.__class__ = type(own.__name__, (own,), {"set_timesteps": set_timesteps, "step": step})
    try:
        yield taken
    finally:
        scheduler.__class__ = own


def _counting(name: str, network: nn.Module, found: dict[str, tuple[PassPlan, Any]]) -> Callable[..., Any]:
    """The forward of a network that computes one pass of each kind; its output stands for those of the others."""
    forward = network.forward

    @functools.wraps(forward)
    def count(*arguments: Any, **settings: Any) -> Any:
        kind = _kind(name, arguments, settings)
        if kind in found:
            one, output = found[kind]
            found[kind] = replace(one, count=one.count + 1), output
        else:
            with _watched(network) as streams:
                one, output = _pass(name, forward, arguments, settings)
            found[kind] = replace(one, streams=streams), output
        return found[kind][1]

    return count


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of the streams that enter the blocks during a pass in this block; none of an unknown class."""
    found: dict[str, tuple[int, ...]] = {}
    if not isinstance(network, tuple(FAMILIES)):
        yield found
        return
    stack = block_stack(network)
    signature = inspect.signature(type(stack.blocks[0]).forward)

    def note(block: nn.Module, arguments: tuple, settings: dict[str, Any]) -> None:
        given = dict(signature.bind(block, *arguments, **settings).arguments)
        found.update({name: tuple(stream.shape) for name, stream in stack.entering(given).items()})

    handle = stack.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _kind(name: str, arguments: tuple, settings: dict[str, Any]) -> str:
    """What passes that take the same have in common: the network, shapes, and everything that is no tensor."""
    stated = tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), (arguments, settings))
    return f"{name} {stated}"


def _pass(name: str, forward: Callable[..., Any], arguments: tuple, settings: dict[str, Any]) -> tuple[PassPlan, Any]:
    """One pass, counted, and its output; what it is given that is large loses its contents."""
    arguments, settings = tree_map_only(
        Tensor, lambda tensor: tensor if keeps(tensor) else without_contents(tensor), (arguments, settings)
    )
    tensors = {key: value for key, value in settings.items() if isinstance(value, Tensor)}
    tensors |= {f"input {place}": value for place, value in enumerate(arguments) if isinstance(value, Tensor)}
    alive = _Alive()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, alive, known_contents():
        output = forward(*arguments, **settings)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    by_operator = counter.get_flop_counts().get("Global", {})
    attention = sum(flops for operator, flops in by_operator.items() if _ATTENTION.search(str(operator))) // 2
    return PassPlan(name, counter.get_total_flops() // 2, alive.peak, shapes, {}, attention_macs=attention), output


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
