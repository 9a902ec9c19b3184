"""Quantized linear layers in plain PyTorch: what `operator.py` must compute, rounding what its kernels round.

    s_i = max|row i| / top,   q_i = round(row i / s_i)           top = 127 (int8) or 448 (e4m3); s_i = 1 for a row of 0
    z_ij = s_i t_j sum_k q_ik p_jk + bias_j                      p, t: the rows of the weight, one for each output
    out = residual + gate act(z)

Integer sums are exact (in float64 here, in int32 in the kernel); sums of e4m3 products are float32. Everything after
the sum is float32, in this order, and rounded once.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from diffusion_opt.kernels.quantizers.formats import E4M3_MAX, INT8_MAX, nonzero, round_e4m3, round_int8

TOPS = {torch.int8: INT8_MAX, torch.float8_e4m3fn: E4M3_MAX}  # the largest number of each type
ACTIVATIONS = ("none", "gelu_tanh", "swiglu")


def quantize_rows(
    x: Float[Tensor, "rows k"], to: torch.dtype
) -> tuple[Shaped[Tensor, "rows k"], Float[Tensor, " rows"]]:
    """Codes in int8 or e4m3, and the float32 scale of each row."""
    x = x.float()
    scales = nonzero(x.abs().amax(-1) / TOPS[to])
    scaled = x / scales[:, None]
    return round_int8(scaled) if to == torch.int8 else round_e4m3(scaled).to(to), scales


def quantized_product(
    x: Shaped[Tensor, "m k"],
    x_scales: Float[Tensor, " m"],
    weight: Shaped[Tensor, "n k"],
    weight_scales: Float[Tensor, " n"],
) -> Float[Tensor, "m n"]:
    """The product that codes and scales stand for, in float32."""
    kind = torch.float64 if x.dtype == torch.int8 else torch.float32
    return (x.to(kind) @ weight.to(kind).mT).float() * x_scales[:, None] * weight_scales


def activate(z: Float[Tensor, "*b n"], activation: str) -> Float[Tensor, "*b c"]:
    """The activation; "swiglu" halves the channels: silu of the first half times the second."""
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "swiglu":
        gate, value = z.chunk(2, dim=-1)
        return F.silu(gate) * value
    return z


def epilogue(
    z: Float[Tensor, "b l n"],
    bias: Float[Tensor, " n"] | None,
    activation: str,
    gate: Float[Tensor, "b m c"] | None,
    residual: Float[Tensor, "b l c"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "b l c"]:
    """residual + gate act(z + bias), rounded to `dtype`."""
    z = z if bias is None else z + bias.float()
    z = activate(z, activation)
    z = z if gate is None else z * gate.float()
    return (z if residual is None else z + residual.float()).to(dtype)
