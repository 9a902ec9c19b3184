"""Where the time of one call goes: by module and by kind of operator.

    seconds_by_part        inside each named group of modules, by forward hooks; what no group covers is "rest"
    seconds_by_operator    inside torch's operators, by kind; what lies between them is "Python and dispatch"

Both are medians over calls, so a moment in which the machine did something else does not count. They are for shares;
`diffusion_opt.evaluation.interleaved` is for totals. An operator is taken as over when it returns, which is true on a
CPU and not on a GPU, where a queue is filled instead: there use torch's profiler.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {  # kind: what a word of the operator's name starts with; the first kind that fits counts
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution"),
    "attention": ("attention",),
    "elementwise and norms": (
        *("add", "sub", "rsub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "sin", "cos", "silu", "sigmoid"),
        *("gelu", "tanh", "sum", "mean", "norm", "softmax"),
    ),
}
MOVES = "copies and shapes"
BETWEEN = "Python and dispatch"
REST = "rest"


def seconds_by_part(
    call: Callable[[], object], parts: Mapping[str, Sequence[nn.Module]], repeats: int = 5
) -> dict[str, float]:
    """Median seconds a call spends inside each group of modules, and "rest" for all else.

    Raises ValueError for repeats < 1, a group named "rest", and groups of which one contains a module of another
    (its seconds would count twice).
    """
    _check_repeats(repeats)
    _check_apart(parts)
    spent: dict[str, float] = defaultdict(float)
    began: dict[nn.Module, float] = {}

    def watch(name: str, module: nn.Module) -> list:
        def before(*_) -> None:
            began[module] = time.perf_counter()

        def after(*_) -> None:
            spent[name] += time.perf_counter() - began[module]

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    call()  # the first call allocates
    hooks = [hook for name, modules in parts.items() for module in modules for hook in watch(name, module)]
    rows = []
    try:
        for _ in range(repeats):
            spent.clear()
            start = time.perf_counter()
            call()
            total = time.perf_counter() - start
            rows.append({**{name: spent.get(name, 0.0) for name in parts}, REST: total - sum(spent.values())})
    finally:
        for hook in hooks:
            hook.remove()
    return _medians(rows)


def seconds_by_operator(call: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Median seconds a call spends in each kind of operator, and "Python and dispatch" for all between them.

    The clock itself costs microseconds an operator, so calls with and without it take turns: what lies between the
    operators is the time of a call without the clock minus the operators' own (0 if the machine was too restless).
    Raises ValueError for repeats < 1.
    """
    _check_repeats(repeats)
    spent: dict[str, float] = defaultdict(float)
    call()
    rows, totals = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        totals.append(time.perf_counter() - began)
        spent.clear()
        with _Clock(spent):
            call()
        rows.append({kind: spent.get(kind, 0.0) for kind in (*_KINDS, MOVES)})
    medians = _medians(rows)
    return {**medians, BETWEEN: max(0.0, statistics.median(totals) - sum(medians.values()))}


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, such as "addmm" or "_scaled_dot_product_flash_attention_for_cpu"."""
    words = operator.split("_")
    for kind, starts in _KINDS.items():
        if any(word.startswith(starts) for word in words):
            return kind
    return MOVES


class _Clock(TorchDispatchMode):
    """Adds the time inside each operator to `spent`, by kind."""

    def __init__(self, spent: dict[str, float]) -> None:
        super().__init__()
        self.spent = spent

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = kind_of(func.name().partition("::")[2].partition(".")[0])
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.spent[kind] += time.perf_counter() - began
        return result


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _check_apart(parts: Mapping[str, Sequence[nn.Module]]) -> None:
    if REST in parts:
        raise ValueError(f"{REST!r} is the name of what no group covers; name this group otherwise")
    owner: dict[nn.Module, str] = {}
    for name, modules in parts.items():
        for inner in (inner for module in modules for inner in module.modules()):
            if inner in owner:
                raise ValueError(f"a {type(inner).__name__} is in the groups {owner[inner]!r} and {name!r}; keep one")
            owner[inner] = name
