"""Where the time of one call goes: by module and by kind of operator.

    seconds_by_part        wall time inside each named group of modules, by forward hooks; what no group covers is "rest"
    seconds_by_operator    time inside torch's operators themselves, by torch's profiler, in the kinds below

Hooks and the profiler slow a call down a little, so these are for shares; `diffusion_opt.evaluation.interleaved` is
for totals. Both tools assume that a call is over when it returns, which is true on the CPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

_KINDS = {  # kind: parts of the names of operators; the first kind that fits counts
    "matrix products": ("mm", "linear", "matmul", "einsum", "conv"),
    "attention": ("attention", "softmax"),
    "copies and shapes": ("copy", "cat", "stack", "contiguous", "clone", "empty", "to", "fill", "index", "embedding"),
}
OTHER = "elementwise and norms"


def seconds_by_part(
    call: Callable[[], object], parts: Mapping[str, Sequence[nn.Module]], repeats: int = 5
) -> dict[str, float]:
    """Mean seconds a call spends inside each group of modules, and "rest" for all else.

    Groups must not contain one another: a second inside two of them would count twice.
    Raises ValueError for repeats < 1, for a group named "rest", and if a module of one group holds one of another.
    """
    if repeats < 1 or "rest" in parts:
        raise ValueError(f"need repeats >= 1 and no group named 'rest', got {repeats} and {sorted(parts)}")
    _check_apart(parts)
    spent = dict.fromkeys(parts, 0.0)
    began: dict[nn.Module, float] = {}

    def watch(name: str, module: nn.Module) -> list:
        def before(*_) -> None:
            began[module] = time.perf_counter()

        def after(*_) -> None:
            spent[name] += time.perf_counter() - began[module]

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    call()  # the first call allocates
    hooks = [hook for name, modules in parts.items() for module in modules for hook in watch(name, module)]
    start = time.perf_counter()
    try:
        for _ in range(repeats):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    total = (time.perf_counter() - start) / repeats
    inside = {name: seconds / repeats for name, seconds in spent.items()}
    return {**inside, "rest": max(0.0, total - sum(inside.values()))}


def seconds_by_operator(call: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Mean seconds a call spends inside torch's operators by kind, and "Python and dispatch" for the time between them.

    Raises ValueError for repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    total = (time.perf_counter() - start) / repeats
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(repeats):
            call()
    spent = dict.fromkeys((*_KINDS, OTHER), 0.0)
    for event in record.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / repeats
    return {**spent, "Python and dispatch": max(0.0, total - sum(spent.values()))}


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, such as "aten::addmm"."""
    words = operator.rpartition("::")[2].strip("_").split("_")
    for kind, names in _KINDS.items():
        if any(word.startswith(names) if kind != "copies and shapes" else word in names for word in words):
            return kind
    return OTHER


def _check_apart(parts: Mapping[str, Sequence[nn.Module]]) -> None:
    owner: dict[nn.Module, str] = {}
    for name, modules in parts.items():
        for module in modules:
            for inner in module.modules():
                if inner in owner:
                    raise ValueError(f"groups {owner[inner]!r} and {name!r} share a {type(inner).__name__}")
                owner[inner] = name

