"""Adaptive normalization of diffusion transformers in one pass: adaLN, and the gated residual before it.

Between two products of matrices a block of a diffusion transformer (Peebles and Xie 2022, arXiv 2212.09748) does

    hidden = x + gate y                                   what attention or the MLP gave, gated
    m      = norm(hidden) (1 + scale) + shift             input of the next one

with gate, scale and shift computed from the time step, one row for a batch entry, or one for each token (Wan 2.2 TI2V).
In PyTorch that is six or seven operations that each read and write all hidden states. Here it is one: two reads and two
writes, nothing else that is large. Statistics and sums are float32; hidden is rounded once, and the norm is that of the
rounded numbers, so the backward pass, which has only these, sees the same.

The backward pass recomputes the norm instead of storing it. Sums over tokens (gradients of gate, scale, shift) are made
per run of tokens and added up afterwards: no atomics, the same bits every time.

Liger-Kernel's `modulated_rms_norm` has scale and shift with their gradients, and its `fused_add_rms_norm` the residual;
neither has the gate, and neither the layer norm. Matches
`Flux2TransformerBlock` (layer norm without weights) and LTX-2 (RMS norm). On a CPU: `oracle.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.fused.modulate import oracle as reference
from diffusion_opt.kernels.fused.modulate.oracle import NORMS

MOST_CHANNELS = 16384  # a row is held in registers


def modulate(
    x: Float[Tensor, "b l c"],
    scale: Float[Tensor, "b m c"],
    shift: Float[Tensor, "b m c"],
    norm: str = "layer",
    eps: float = 1e-6,
) -> Float[Tensor, "b l c"]:
    """norm(x) (1 + scale) + shift in x's type; m is 1 (one row for all tokens) or l. Differentiable in all three.

    `norm` is "layer" or "rms", without weights. Raises ValueError for another norm, for parameters of other shapes, and
    where a kernel would run for float64 or more than 16384 channels.
    """
    _check(x, norm, scale=scale, shift=shift)
    return modulate_op(x, scale, shift, norm, eps)


def gated_modulate(
    x: Float[Tensor, "b l c"],
    y: Float[Tensor, "b l c"],
    gate: Float[Tensor, "b m c"],
    scale: Float[Tensor, "b m c"],
    shift: Float[Tensor, "b m c"],
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b l c"]]:
    """hidden = x + gate y, and norm(hidden) (1 + scale) + shift, both in x's type; differentiable in all five.

    Arguments and errors as for `modulate`; y has x's type.
    """
    _check(x, norm, gate=gate, scale=scale, shift=shift)
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"x and y are alike, got {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}")
    return gated_modulate_op(x, y, gate, scale, shift, norm, eps)


def _check(x: Tensor, norm: str, **parameters: Tensor) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    b, length, channels = x.shape
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    if len(shapes) > 1 or not shapes <= {(b, 1, channels), (b, length, channels)}:
        found = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items())
        raise ValueError(
            f"parameters for {tuple(x.shape)} have all ({b}, 1, {channels}) or all ({b}, {length}, {channels}): {found}"
        )


def _check_kernel_can(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError("the kernels compute in float32: convert float64 inputs")
    if x.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"a kernel holds a row in registers, at most {MOST_CHANNELS} channels, got {x.shape[-1]}")


@torch.library.custom_op("diffusion_opt::modulate", mutates_args=())
def modulate_op(x: Tensor, scale: Tensor, shift: Tensor, norm: str, eps: float) -> Tensor:
    """Contiguous norm(x) (1 + scale) + shift."""
    if runtime.mode(x) == "reference":
        return reference.modulate(x, scale, shift, norm, eps).contiguous()
    _check_kernel_can(x)
    from diffusion_opt.kernels.fused.modulate.kernel import forward  # Triton exists on Linux only

    return forward(x, None, None, scale, shift, norm, eps)[1]


@modulate_op.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, norm: str, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("diffusion_opt::modulate_backward", mutates_args=())
def modulate_backward_op(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of x, scale and shift, in their types."""
    if runtime.mode(x) == "reference":
        return _rounded(reference.modulate_backward(grad, x, scale, norm, eps), (x, scale, shift))
    from diffusion_opt.kernels.fused.modulate.kernel import backward

    dx, _, _, dscale, dshift = backward(None, grad, x, None, None, scale, norm, eps)
    return _rounded((dx, dscale, dshift), (x, scale, shift))


@modulate_backward_op.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), shift.new_empty(shift.shape)


@torch.library.custom_op("diffusion_opt::gated_modulate", mutates_args=())
def gated_modulate_op(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Contiguous hidden = x + gate y and norm(hidden) (1 + scale) + shift."""
    if runtime.mode(x) == "reference":
        hidden, modulated = reference.gated_modulate(x, y, gate, scale, shift, norm, eps)
        return hidden.contiguous(), modulated.contiguous()
    _check_kernel_can(x)
    from diffusion_opt.kernels.fused.modulate.kernel import forward

    return forward(x, y, gate, scale, shift, norm, eps)


@gated_modulate_op.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("diffusion_opt::gated_modulate_backward", mutates_args=())
def gated_modulate_backward_op(
    grad_hidden: Tensor, grad: Tensor, hidden: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    norm: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous gradients of x, y, gate, scale and shift, in their types."""
    like = (hidden, y, gate, scale, shift)
    if runtime.mode(hidden) == "reference":
        return _rounded(reference.gated_modulate_backward(grad_hidden, grad, *like[:-1], norm, eps), like)
    from diffusion_opt.kernels.fused.modulate.kernel import backward

    return _rounded(backward(grad_hidden, grad, *like[:-1], norm, eps), like)


@gated_modulate_backward_op.register_fake
def _(
    grad_hidden: Tensor, grad: Tensor, hidden: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    norm: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(like.new_empty(like.shape) for like in (hidden, y, gate, scale, shift))


def _rounded(gradients: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, like, strict=True))


def _save_for_modulate(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _modulate_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    return *modulate_backward_op(grad, *ctx.saved_tensors, ctx.norm, ctx.eps), None, None


def _save_for_gated(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    _, *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(output[0], *tensors)


def _gated_gradients(ctx: torch.autograd.function.FunctionCtx, grad_hidden: Tensor, grad: Tensor) -> tuple:
    return *gated_modulate_backward_op(grad_hidden, grad, *ctx.saved_tensors, ctx.norm, ctx.eps), None, None


modulate_op.register_autograd(_modulate_gradients, setup_context=_save_for_modulate)
gated_modulate_op.register_autograd(_gated_gradients, setup_context=_save_for_gated)
