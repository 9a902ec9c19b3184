"""The kernels behind `operator.py`: rows to 8 bits, and a product of 8-bit matrices with its epilogue.

`linear_kernel` computes a BLOCK_M x BLOCK_N tile of the output, walking over the input features in steps of BLOCK_K.
Tiles are numbered so that GROUP rows of them run at about the same time and share the weight's columns in the L2 cache.
For SwiGLU a program computes two tiles, of a column of gates and of the values it belongs to, half the weight apart, so
that the product of the two is in its registers.

On sm_90 the matrix units add e4m3 products with fewer bits than float32. Every BLOCK_K features their sum is added to a
float32 accumulator (`max_num_imprecise_acc`), as DeepSeek-V3 (2024, arXiv 2412.19437, section 3.3.2) does; asking for
no imprecise sum at all makes the compiler give up the 8-bit matrix units.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.gemm.oracle import TOPS
from diffusion_opt.kernels.launch import GEMM_FP8, GEMM_INT8, LaunchConfig
from diffusion_opt.kernels.quantizers.rounding import largest, nonzero, round_int8

GROUP = 8  # rows of tiles that share columns of the weight in the cache
BLOCK_K = 128  # features of a step
ADDED_COLUMNS = 128  # of a tile that gate and residual are read into: with more they do not fit the registers


@triton.jit
def quantize_rows_kernel(X, VALUES, SCALES, columns, stride, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """One row. VALUES is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    scale = nonzero(tl.div_rn(largest(tl.abs(x), 0), TOP))
    scaled = tl.div_rn(x, scale)
    kind = VALUES.dtype.element_ty
    values = round_int8(scaled) if kind == tl.int8 else scaled.to(kind)
    tl.store(VALUES + row * columns + column, values, mask=column < columns)
    tl.store(SCALES + row, scale)


@triton.jit
def load_steps(base, rows, steps, num_rows, end, stride, EVEN_K: tl.constexpr):
    """A tile of rows by input features, 0 outside."""
    address = base + rows.to(tl.int64)[:, None] * stride + steps[None, :]
    inside = (rows < num_rows)[:, None]
    if not EVEN_K:
        inside = inside & (steps < end)[None, :]
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def multiply(x, w, total, BLOCK_K: tl.constexpr):
    """total + x w^T in the accumulator's type."""
    if total.dtype == tl.int32:
        total = tl.dot(x, tl.trans(w), total, out_dtype=tl.int32)
    else:
        total += tl.dot(x, tl.trans(w), max_num_imprecise_acc=BLOCK_K)
    return total


@triton.jit
def scaled(total, x_scale, columns, num_outputs, W_SCALES, BIAS, HAS_BIAS: tl.constexpr):
    """The sums in float32 times both scales, with the bias."""
    inside = columns < num_outputs
    z = total.to(tl.float32) * x_scale[:, None] * tl.load(W_SCALES + columns, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        z += tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def linear_kernel(
    X, X_SCALES, W, W_SCALES, BIAS, GATE, RESIDUAL, OUT, num_rows, num_outputs, num_channels, num_features, length,
    stride_x, stride_w, gate_steps, residual_steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    INTEGER: tl.constexpr,
):  # fmt: skip
    """A tile of OUT (contiguous, num_rows x num_channels); rows are tokens of a batch, `length` to an entry."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_channels, BLOCK_N)
    band = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    rows = (band * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], kind)
    other = tl.zeros([BLOCK_M, BLOCK_N], kind)
    for first in range(0, num_features, BLOCK_K):
        steps = first + tl.arange(0, BLOCK_K)
        x = load_steps(X, rows, steps, num_rows, num_features, stride_x, EVEN_K)
        w = load_steps(W, columns, steps, num_channels, num_features, stride_w, EVEN_K)
        total = multiply(x, w, total, BLOCK_K)
        if ACTIVATION == "swiglu":
            w = load_steps(W, columns + num_channels, steps, num_outputs, num_features, stride_w, EVEN_K)
            other = multiply(x, w, other, BLOCK_K)
    x_scale = tl.load(X_SCALES + rows, mask=rows < num_rows, other=0.0)
    z = scaled(total, x_scale, columns, num_outputs, W_SCALES, BIAS, HAS_BIAS)
    if ACTIVATION == "swiglu":
        z *= tl.sigmoid(z) * scaled(other, x_scale, columns + num_channels, num_outputs, W_SCALES, BIAS, HAS_BIAS)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
        z *= tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    inside = (rows < num_rows)[:, None] & (columns < num_channels)[None, :]
    entry, token = (rows // length).to(tl.int64)[:, None], (rows % length).to(tl.int64)[:, None]
    if HAS_GATE:
        address = GATE + entry * gate_steps[0] + token * gate_steps[1] + columns[None, :]
        z *= tl.load(address, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        address = RESIDUAL + entry * residual_steps[0] + token * residual_steps[1] + columns[None, :]
        z += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    address = OUT + rows.to(tl.int64)[:, None] * num_channels + columns[None, :]
    tl.store(address, z.to(OUT.dtype.element_ty), mask=inside)


def quantize(x: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the quantizer: codes, contiguous, and scales."""
    x = x if x.stride(1) == 1 else x.contiguous()
    values, scales = torch.empty(x.shape, dtype=to, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)
    block = triton.next_power_of_2(x.shape[1])
    runtime.run(
        quantize_rows_kernel,
        (x.shape[0],),
        *(x, values, scales, x.shape[1], x.stride(0)),
        TOP=TOPS[to],
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return values, scales


def linear(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Launch the product: output (b, l, c). Raises ValueError for e4m3 before sm_89."""
    b, length, k = x.shape
    n = weight.shape[0]
    channels = n // 2 if activation == "swiglu" else n
    x, weight = x.contiguous(), weight.contiguous()
    gate, residual = (None if r is None else r if r.stride(-1) == 1 else r.contiguous() for r in (gate, residual))
    out = torch.empty(b, length, channels, dtype=dtype, device=x.device)
    added = gate is not None or residual is not None
    choice = product_launch(x.dtype, activation, runtime.architecture(x.device), added)
    tiles = triton.cdiv(b * length, choice.block_m) * triton.cdiv(channels, choice.block_n)
    absent = out  # stands in for what is not there, and is not read
    runtime.run(
        linear_kernel,
        (tiles,),
        *(x, x_scales.contiguous(), weight, weight_scales.contiguous(), absent if bias is None else bias.contiguous()),
        *(absent if gate is None else gate, absent if residual is None else residual, out),
        *(b * length, n, channels, k, length, k, k, _steps(gate), _steps(residual)),
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=k % BLOCK_K == 0,
        INTEGER=x.dtype == torch.int8,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    return out


def product_launch(dtype: torch.dtype, activation: str, arch: int, added: bool) -> LaunchConfig:
    """The tile of a product: 128 wide at most if gate or residual are `added`, and half as wide for SwiGLU's two.

    Raises ValueError for e4m3 before sm_89.
    """
    table = GEMM_INT8 if dtype == torch.int8 else GEMM_FP8
    if arch not in table:
        raise ValueError(f"sm_{arch} has no e4m3: quantize to int8, or use sm_89 or later")
    choice = table[arch]
    if activation == "swiglu":
        return replace(choice, block_n=choice.block_n // 2)
    return replace(choice, block_n=min(choice.block_n, ADDED_COLUMNS)) if added else choice


def _steps(rows: Tensor | None) -> tuple[int, int]:
    """Numbers to the next batch entry and token, 0 for a token where all share one row."""
    if rows is None:
        return 0, 0
    return rows.stride(0), rows.stride(1) if rows.shape[1] > 1 else 0
