"""Quantized linear layers: products of 8-bit matrices, with all that follows in the same pass.

    x = quantize_rows(hidden, torch.int8)                  # codes and one scale for each token
    w = quantize_rows(linear.weight, torch.int8)           # once; one scale for each output channel
    out = quantized_linear(x, w, linear.bias, torch.bfloat16, activation="gelu_tanh")
    out = quantized_linear(x, w, linear.bias, torch.bfloat16, gate=gate, residual=hidden)

"W8A8" in int8 (sums exact in int32, from sm_80 on) or in e4m3 (sums in float32, from sm_89 on): matrix units run both
at twice the rate of bfloat16. A scale for each token and each channel can be taken out of the sum, so the tile is
multiplied by both once at the end; bias, activation (tanh GELU, or SwiGLU as in FLUX.2: silu of the first half of the
channels times the second), gate and residual follow while it is in registers. Written separately, each of these reads
and writes all hidden states.

torch offers the bare products (`torch._int_mm`, `torch._scaled_mm`); LTX-2's and TurboDiffusion's int8 layers fuse the
scales. Inference only: there is no gradient. On a CPU: `oracle.py`, which is exact and not fast; for speed on a
CPU see `quantization.DynamicInt8`. `quantization.W8A8` puts these products into a pipeline.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.gemm import oracle as reference
from diffusion_opt.kernels.gemm.oracle import ACTIVATIONS, TOPS

MOST_COLUMNS = 32768  # a row is held in registers while it is quantized
STEP = 16  # matrix units and 16-byte loads take input features in multiples of this


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A matrix in 8 bits with a scale for each row; `values * scales[..., None]` is what it stands for."""

    values: Shaped[Tensor, "*b rows k"]  # int8 or float8_e4m3fn
    scales: Float[Tensor, "*b rows"]  # float32

    def __post_init__(self) -> None:
        if self.scales.shape != self.values.shape[:-1] or self.scales.dtype is not torch.float32:
            raise ValueError(
                f"rows {tuple(self.values.shape)} have a float32 scale each, got {tuple(self.scales.shape)} "
                f"{self.scales.dtype}"
            )


def quantize_rows(x: Float[Tensor, "*b rows k"], to: torch.dtype) -> QuantizedRows:
    """Round to int8 or float8_e4m3fn with the scale of each row, its largest magnitude over 127 or 448.

    Raises ValueError for another type, and where a kernel would run for float64 or more than 32768 columns.
    """
    if to not in TOPS:
        raise ValueError(f"quantize to one of {', '.join(map(str, TOPS))}, got {to}")
    values, scales = quantize_rows_op(x.reshape(-1, x.shape[-1]), to)
    return QuantizedRows(values.view(x.shape), scales.view(x.shape[:-1]))


def quantized_linear(
    x: QuantizedRows,
    weight: QuantizedRows,
    bias: Float[Tensor, " n"] | None,
    dtype: torch.dtype,
    *,
    activation: str = "none",
    gate: Float[Tensor, "b m c"] | None = None,
    residual: Float[Tensor, "b l c"] | None = None,
) -> Float[Tensor, "b l c"]:
    """residual + gate act(x weight^T + bias) in `dtype`, for x of (b, l, k) and a weight of (n, k).

    c is n, half of it for "swiglu"; gate has one row for all tokens (m = 1) or one for each (m = l). Raises ValueError
    for types, shapes or an activation that do not fit, and where a kernel would run for k or n that are no multiples of
    16.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.values.dtype != weight.values.dtype or x.values.dtype not in TOPS:
        raise ValueError(f"x and weight are both int8 or both e4m3, got {x.values.dtype} and {weight.values.dtype}")
    if x.values.ndim != 3 or weight.values.ndim != 2:
        raise ValueError(
            f"x is (b, l, k) and the weight (n, k), got {tuple(x.values.shape)} and {tuple(weight.values.shape)}"
        )
    b, length, k = x.values.shape
    n, inputs = weight.values.shape
    if inputs != k:
        raise ValueError(f"x has {k} features, the weight takes {inputs}")
    if activation == "swiglu" and n % 2:
        raise ValueError(f"swiglu halves the outputs, so their number must be even, got {n}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"a bias has a number for each of the {n} outputs, got {tuple(bias.shape)}")
    c = n // 2 if activation == "swiglu" else n
    if gate is not None and gate.shape not in ((b, 1, c), (b, length, c)):
        raise ValueError(f"gate must be ({b}, 1, {c}) or ({b}, {length}, {c}), got {tuple(gate.shape)}")
    if residual is not None and residual.shape != (b, length, c):
        raise ValueError(f"residual must be ({b}, {length}, {c}), got {tuple(residual.shape)}")
    tensors = (x.values, x.scales, weight.values, weight.scales, bias, gate, residual)
    return quantized_linear_op(*tensors, activation, dtype)


@torch.library.custom_op("diffusion_opt::quantize_rows", mutates_args=())
def quantize_rows_op(x: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix."""
    if runtime.mode(x) == "reference":
        return reference.quantize_rows(x, to)
    if x.dtype == torch.float64 or x.shape[1] > MOST_COLUMNS:
        raise ValueError(
            f"a kernel holds a row in registers, at most {MOST_COLUMNS} columns of float32: got {x.shape[1]}, {x.dtype}"
        )
    from diffusion_opt.kernels.gemm.kernel import quantize  # Triton exists on Linux only

    return quantize(x, to)


@quantize_rows_op.register_fake
def _(x: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=to), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("diffusion_opt::quantized_linear", mutates_args=())
def quantized_linear_op(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Contiguous output (b, l, c)."""
    b, length, k = x.shape
    if runtime.mode(x) == "reference":
        z = reference.quantized_product(x.reshape(-1, k), x_scales.reshape(-1), weight, weight_scales)
        return reference.epilogue(z.view(b, length, -1), bias, activation, gate, residual, dtype).contiguous()
    if k % STEP or weight.shape[0] % STEP:
        raise ValueError(
            f"features in and out must be multiples of {STEP}, got {k} and {weight.shape[0]}: pad the weight"
        )
    from diffusion_opt.kernels.gemm.kernel import linear

    return linear(x, x_scales, weight, weight_scales, bias, gate, residual, activation, dtype)


@quantized_linear_op.register_fake
def _(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n = weight.shape[0]
    return x.new_empty(*x.shape[:2], n // 2 if activation == "swiglu" else n, dtype=dtype)


@register_flop_formula(torch.ops.diffusion_opt.quantized_linear)
def _(x: torch.Size, x_scales: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * x[0] * x[1] * x[2] * weight[0]
