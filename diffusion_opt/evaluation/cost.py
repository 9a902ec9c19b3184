"""How much arithmetic it takes: multiply-accumulates of the calls that really happen, counted and not estimated.

`count(fn, transformer)` runs the function once under torch's `FlopCounterMode`, which sees every operation below the
modules, and counts the transformer's forward passes (NFE, the number of function evaluations) with a hook. A formula
on paper knows nothing of a step cache that skipped blocks, of guidance that doubled the passes, or of a step that the
scheduler did not take; this does. One MAC is one multiplication with its addition, two FLOPs:

    linear  (n, i) -> (n, o)             n i o
    attention, h heads, q x k, width d   2 h q k d        (scores, then values)

Elementwise work (norms, activations, rotary embedding) is not counted, as is usual. torch knows no formula for the
attention kernel it uses on a CPU nor for quantized linears; they are added here. Work that looks like a matrix product
and has no formula raises an error instead of counting as nothing. A custom kernel is seen if it is a registered
operator (`torch.library`); give it a formula with `torch.utils.flop_counter.register_flop_formula`. A compiled
module is counted in its eager form: torch suspends compilation while the counter watches.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_HEAVY = re.compile(r"(^|_)(mm|bmm|addmm|baddbmm|matmul|gemm|q?linear|conv\w*|convolution|attention|sdpa|einsum)(_|$)")


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic of one run: multiply-accumulates in all and by operator, and the transformer's passes.

    A pass that a step cache cut short counts as one, its MACs tell; one that multiplied nothing, because a guidance
    cache answered in its place, as none.
    """

    macs: int
    nfe: int
    macs_by_operator: dict[str, int] = field(default_factory=dict)


class UncountedWorkError(RuntimeError):
    """An operator that does matrix work has no formula, so the count would be too low."""


def count(fn: Callable[[], object], transformer: nn.Module | None = None) -> Cost:
    """Run `fn` once and count its MACs and the forward passes of `transformer`.

    Raises UncountedWorkError if an operator that looks like a matrix product has no formula.
    """
    flops = FlopCounterMode(display=False, custom_mapping=_formulas())
    uncounted = _Uncounted(flops)
    before, worked = [], []  # FLOPs when the pass under way began; whether each pass did any
    hooks = () if transformer is None else (
        transformer.register_forward_pre_hook(lambda *_: before.append(flops.get_total_flops())),
        transformer.register_forward_hook(lambda *_: worked.append(flops.get_total_flops() > before.pop())),
    )  # fmt: skip
    try:
        with uncounted, flops:
            fn()
    finally:
        for hook in hooks:
            hook.remove()
    if uncounted.names:
        raise UncountedWorkError(
            f"no formula for {sorted(uncounted.names)[0]}, so its work would count as nothing; register one with "
            "torch.utils.flop_counter.register_flop_formula"
        )
    by_operator = {str(name): number // 2 for name, number in flops.get_flop_counts().get("Global", {}).items()}
    return Cost(sum(by_operator.values()), sum(worked), by_operator)


class _Uncounted(TorchDispatchMode):
    """Lies below the counter and remembers operators that look like matrix work and have no formula.

    The counter takes composite operators apart before it hands them on, so only those that really run arrive here.
    """

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.formulas = flops.flop_registry
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self.formulas and _HEAVY.search(func.name().partition("::")[2].partition(".")[0]):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def _rows_by_columns(inputs: Tensor, *_, out_val: Tensor, **__) -> int:
    """FLOPs of a product whose second factor may be packed: each output is a dot product over the inputs."""
    return 2 * out_val.numel() * inputs.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_, out_val: object, **__) -> int:
    """FLOPs of scores and values, by torch's own formula for the other attention kernels."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# FlopCounterMode hands these tensors in place of shapes, and the output as `out_val`.
_rows_by_columns._get_raw = _attention._get_raw = True


def _formulas() -> dict:
    """Formulas for operators that torch has but does not count, built anew for each count."""
    aten, quantized = torch.ops.aten, torch.ops.quantized
    products = (
        torch.ops.onednn.qlinear_pointwise,
        quantized.linear,
        quantized.linear_dynamic,
        quantized.linear_relu_dynamic,
        quantized.linear_dynamic_fp16,
        aten._int_mm,
        aten._weight_int8pack_mm,
        aten._weight_int4pack_mm_for_cpu,
    )
    return {aten._scaled_dot_product_flash_attention_for_cpu: _attention, **dict.fromkeys(products, _rows_by_columns)}
