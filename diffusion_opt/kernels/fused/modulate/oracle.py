"""Adaptive normalization in plain PyTorch, with its gradient: what `operator.py` must compute.

    m = n (1 + scale) + shift,    n = (x - mean x) r   or   x r,    r = (mean square of the numerator + eps)^-1/2

over the channels of each token. With dm arriving at m and e = dm (1 + scale),

    dx = r (e - mean(e) - n mean(e n)),     without mean(e) for the RMS norm;     dscale = sum dm n,   dshift = sum dm

the sums over the tokens that share a scale. Arithmetic is float32 for shorter types, and float64 for float64.
"""

import torch
from jaxtyping import Float
from torch import Tensor

NORMS = ("layer", "rms")


def wide(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float64 if a tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def normalize(
    x: Float[Tensor, "b l c"], norm: str, eps: float
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b l 1"]]:
    """Normalized channels n and the factor r."""
    centered = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    factor = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centered * factor, factor


def modulate(
    x: Float[Tensor, "b l c"], scale: Float[Tensor, "b m c"], shift: Float[Tensor, "b m c"], norm: str, eps: float
) -> Float[Tensor, "b l c"]:
    """m in x's type."""
    kind = wide(x)
    return (normalize(x.to(kind), norm, eps)[0] * (1 + scale.to(kind)) + shift.to(kind)).to(x.dtype)


def gated_modulate(
    x: Float[Tensor, "b l c"],
    y: Float[Tensor, "b l c"],
    gate: Float[Tensor, "b m c"],
    scale: Float[Tensor, "b m c"],
    shift: Float[Tensor, "b m c"],
    norm: str,
    eps: float,
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b l c"]]:
    """x + gate y in x's type, and its m."""
    kind = wide(x)
    hidden = torch.addcmul(x.to(kind), gate.to(kind), y.to(kind)).to(x.dtype)
    return hidden, modulate(hidden, scale, shift, norm, eps)


def modulate_backward(
    grad: Float[Tensor, "b l c"], x: Float[Tensor, "b l c"], scale: Float[Tensor, "b m c"], norm: str, eps: float
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b m c"], Float[Tensor, "b m c"]]:
    """Gradients of x, scale and shift, not yet rounded to their types."""
    kind = wide(x)
    grad = grad.to(kind)
    n, factor = normalize(x.to(kind), norm, eps)
    e = grad * (1 + scale.to(kind))
    centered = e - e.mean(-1, keepdim=True) if norm == "layer" else e
    dx = factor * (centered - n * (e * n).mean(-1, keepdim=True))
    return dx, shared_sum(grad * n, scale), shared_sum(grad, scale)


def gated_modulate_backward(
    grad_hidden: Float[Tensor, "b l c"],
    grad: Float[Tensor, "b l c"],
    hidden: Float[Tensor, "b l c"],
    y: Float[Tensor, "b l c"],
    gate: Float[Tensor, "b m c"],
    scale: Float[Tensor, "b m c"],
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, scale and shift, not yet rounded to their types."""
    dx, dscale, dshift = modulate_backward(grad, hidden, scale, norm, eps)
    dx = dx + grad_hidden.to(dx.dtype)
    return dx, dx * gate.to(dx.dtype), shared_sum(dx * y.to(dx.dtype), gate), dscale, dshift


def shared_sum(terms: Float[Tensor, "b l c"], like: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
    """The sum over tokens if one row serves all of them (m = 1), else a copy of the terms."""
    return terms.sum(1, keepdim=True) if like.shape[1] == 1 else terms.clone()
