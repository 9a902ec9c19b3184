"""The kernels behind `operator.py`: a row of channels in registers, read once and written once.

Forward, a program owns a token: it loads the row, adds the gated residual, takes mean and mean square, and writes what
the next operation reads. Backward, a program owns a run of tokens of one batch entry, so that sums over tokens grow in
its registers; where one row of parameters serves all tokens it writes one partial sum a run, and PyTorch adds up these.
Nothing here multiplies matrices: time is the bytes moved over the bandwidth of the memory. Each row is loaded as late
as possible, so that three rows of sums and those in use fit the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.launch import LaunchConfig

RUN = 16  # tokens of a program of the backward pass


@triton.jit
def row_of_token(X, steps, b, token):
    """Where the channels of a token begin; `steps` go to the next batch entry and token, 0 where tokens share a row."""
    return X + b * steps[0] + token * steps[1]


@triton.jit
def normalized(x, inside, channels, eps, LAYER: tl.constexpr):
    """Normalized row and the factor it was multiplied by."""
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, 0) / channels, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    return x * factor, factor


@triton.jit
def forward_kernel(
    X, Y, GATE, SCALE, SHIFT, HIDDEN, OUT, eps, length, channels,
    x_steps, y_steps, gate_steps, scale_steps, shift_steps,
    BLOCK_C: tl.constexpr, LAYER: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One token. HIDDEN and OUT are contiguous; strides of parameters are 0 where tokens share a row."""
    row = tl.program_id(0).to(tl.int64)
    b, token = row // length, row % length
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    x = tl.load(row_of_token(X, x_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(row_of_token(Y, y_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(row_of_token(GATE, gate_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
        hidden = (x + gate * y).to(HIDDEN.dtype.element_ty)
        tl.store(HIDDEN + row * channels + column, hidden, mask=inside)
        x = hidden.to(tl.float32)
    n, _ = normalized(x, inside, channels, eps, LAYER)
    scale = tl.load(row_of_token(SCALE, scale_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(row_of_token(SHIFT, shift_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * channels + column, (n * (1.0 + scale) + shift).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    GRAD_HIDDEN, GRAD, HIDDEN, Y, GATE, SCALE, GRAD_X, GRAD_Y, GRAD_GATE, GRAD_SCALE, GRAD_SHIFT, eps, length, channels,
    arriving_steps, grad_steps, x_steps, y_steps, gate_steps, scale_steps,
    BLOCK_C: tl.constexpr, RUN: tl.constexpr, LAYER: tl.constexpr, GATED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """RUN tokens of a batch entry. Results are contiguous; those of parameters are one row a run if SHARED."""
    runs = tl.cdiv(length, RUN)
    run = tl.program_id(0).to(tl.int64)
    b, first = run // runs, run % runs * RUN
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    sum_gate, sum_scale, sum_shift = (
        tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32),
    )  # fmt: skip
    for token in range(first, tl.minimum(first + RUN, length)):
        place = (b * length + token) * channels + column
        x = tl.load(row_of_token(HIDDEN, x_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
        n, factor = normalized(x, inside, channels, eps, LAYER)
        grad = tl.load(row_of_token(GRAD, grad_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
        if SHARED:
            sum_scale += grad * n
            sum_shift += grad
        else:
            tl.store(GRAD_SCALE + place, grad * n, mask=inside)
            tl.store(GRAD_SHIFT + place, grad, mask=inside)
        scale = tl.load(row_of_token(SCALE, scale_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
        e = grad * (1.0 + scale)
        if LAYER:
            e -= tl.sum(e, 0) / channels  # before the other mean, which does not change: the mean of n is 0
        grad_x = (e - n * (tl.sum(e * n, 0) / channels)) * factor
        if GATED:
            arriving = tl.load(row_of_token(GRAD_HIDDEN, arriving_steps, b, token) + column, mask=inside, other=0.0)
            grad_x += arriving.to(tl.float32)
            gate = tl.load(row_of_token(GATE, gate_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(GRAD_Y + place, (grad_x * gate).to(GRAD_Y.dtype.element_ty), mask=inside)
            y = tl.load(row_of_token(Y, y_steps, b, token) + column, mask=inside, other=0.0).to(tl.float32)
            if SHARED:
                sum_gate += grad_x * y
            else:
                tl.store(GRAD_GATE + place, grad_x * y, mask=inside)
        tl.store(GRAD_X + place, grad_x.to(GRAD_X.dtype.element_ty), mask=inside)
    if SHARED:
        tl.store(GRAD_SCALE + run * channels + column, sum_scale, mask=inside)
        tl.store(GRAD_SHIFT + run * channels + column, sum_shift, mask=inside)
        if GATED:
            tl.store(GRAD_GATE + run * channels + column, sum_gate, mask=inside)


def row_launch(channels: int) -> LaunchConfig:
    """A token at a time, eight numbers of each row in a thread; with more than 16 warps registers run out."""
    block = triton.next_power_of_2(channels)
    return LaunchConfig(1, block, min(16, max(1, block // 256)), 1)


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel: hidden (x itself without a gate) and the modulated rows."""
    b, length, channels = x.shape
    rows = _with_rows(x, y, gate, scale, shift)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = x if gate is None else torch.empty_like(out)
    choice = row_launch(channels)
    runtime.run(
        forward_kernel,
        (b * length,),
        *(*rows, hidden, out, eps, length, channels, *_steps(*rows)),
        BLOCK_C=choice.block_n,
        LAYER=norm == "layer",
        GATED=gate is not None,
        num_warps=choice.num_warps,
    )
    return hidden, out


def backward(
    grad_hidden: Tensor | None, grad: Tensor, hidden: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    norm: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel: gradients of x and y in their types, of gate, scale and shift in float32."""
    b, length, channels = hidden.shape
    rows = _with_rows(grad_hidden, grad, hidden, y, gate, scale)
    shared = scale.shape[1] == 1
    runs = triton.cdiv(length, RUN)
    grad_x = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_y = torch.empty_like(grad_x)
    parts = [grad_x.new_empty(b, runs if shared else length, channels, dtype=torch.float32) for _ in range(3)]
    choice = row_launch(channels)
    runtime.run(
        backward_kernel,
        (b * runs,),
        *(*rows, grad_x, grad_y, *parts, eps, length, channels, *_steps(*rows)),
        BLOCK_C=choice.block_n,
        RUN=RUN,
        LAYER=norm == "layer",
        GATED=gate is not None,
        SHARED=shared,
        num_warps=choice.num_warps,
    )
    return grad_x, grad_y, *(part.sum(1, keepdim=True) if shared else part for part in parts)


def _with_rows(*tensors: Tensor | None) -> list[Tensor]:
    """Tensors whose channels lie together, copied if need be; the last one stands in for one that is absent."""
    present = tensors[-1]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (present if x is None else x for x in tensors)]


def _steps(*rows: Tensor) -> list[tuple[int, int]]:
    """Steps to the next batch entry and token, 0 for a token where all share one row."""
    return [(x.stride(0), x.stride(1) if x.shape[1] > 1 else 0) for x in rows]
