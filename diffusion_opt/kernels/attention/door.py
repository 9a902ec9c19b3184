"""The one door to attention: `attention(q, k, v)`, in any precision, dense or sparse, on a GPU or a laptop.

    attention(q, k, v)                                             dense, in the type of q
    attention(q, k, v, precision="int8")                           fewer bits
    attention(q, k, v, sparsity=sliding_tile(tiles, (3, 3, 3)))    listed tiles only
    attention(q, k, v, sparsity=CachedRegion(region, k_all, v_all))    active tokens against a cache
    explain(q, k, v, precision="int8")                             which code that call runs, and why

`choose` looks at the arguments and decides between three bodies of the same operation:

    Triton kernel     for a CUDA tensor that the kernel can take
    reference         for a CPU tensor: plain PyTorch that masks, rounds and sums as the kernel does
    torch's own SDPA  for dense attention on a CPU, and for heads or types that the dense kernel does not take

Dense attention may fall back, because every way to compute it gives the same numbers up to rounding. A call for low
precision or sparsity never becomes a dense one: where no kernel can serve it, it raises ValueError with the reason.
SageAttention's `sageattn`, for one, takes any further argument and ignores it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import Mask, checked_scale
from diffusion_opt.kernels.attention.dense.operator import KERNEL_TYPES, dense_attention
from diffusion_opt.kernels.attention.dense.oracle import fast_attention
from diffusion_opt.kernels.attention.eight_bit.fp8 import fp8_attention
from diffusion_opt.kernels.attention.eight_bit.int8 import int8_attention
from diffusion_opt.kernels.attention.fp4.operator import fp4_attention
from diffusion_opt.kernels.attention.region.operator import Region
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.operator import block_sparse_attention
from diffusion_opt.kernels.launch import launch, row_of

Precision = Literal["dense", "int8", "int8-fp8", "fp8", "nvfp4"]
SDPA = "torch's scaled_dot_product_attention"

# precision -> (row of the launch table that says where it runs, operation)
LOW_PRECISION: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "int8": ("int8_scores_fp16_values", int8_attention),
    "int8-fp8": ("int8_scores_fp8_values", partial(int8_attention, values_in="fp8")),
    "fp8": ("fp8_scores_fp8_values", fp8_attention),
    "nvfp4": ("fp4_forward", fp4_attention),
}
BACKWARD = {  # row of the forward kernel -> rows of the kernels of its gradient
    "dense_forward": ("dense_keys", "dense_queries"),
    "fp4_forward": ("fp4_keys", "fp4_queries"),
    "block_sparse_forward": ("block_sparse_keys", "block_sparse_queries"),
}


@dataclass(frozen=True, slots=True)
class CachedRegion:
    """Sparsity by queries: q, k, v are the rows of the active tokens, the caches hold those of all tokens.

    The active rows of k and v are written into the caches, in place, before attention reads them.
    """

    region: Region
    k_cache: Float[Tensor, "b h l d"]
    v_cache: Float[Tensor, "b h l d"]
    tiles: BlockMask | None = None  # restricts the keys; its rows are blocks of active queries


Sparsity = BlockMask | CachedRegion


@dataclass(frozen=True, slots=True)
class Choice:
    """The code a call runs, and why."""

    run: Callable[[], Tensor]
    operation: str  # "dense attention"
    body: str  # "a Triton kernel for sm_90"
    reason: str  # "q is a bfloat16 CUDA tensor"

    def __str__(self) -> str:
        return f"{self.operation} by {self.body}: {self.reason}"


def attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    *,
    precision: Precision = "dense",
    sparsity: Sparsity | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h lq d"]:
    """softmax(scale q k^T + mask) v in a precision, over all keys or over what `sparsity` leaves.

    `mask` is bool (True is open) or a bias and broadcasts to (b, h, lq, lk); `scale` is 1 / sqrt(d) unless given; a
    query with every key masked gives zeros. Raises ValueError for a combination that no kernel serves, with the reason,
    and for shapes and types that do not fit together.
    """
    return choose(q, k, v, mask, precision=precision, sparsity=sparsity, scale=scale).run()


def explain(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    *,
    precision: Precision = "dense",
    sparsity: Sparsity | None = None,
    scale: float | None = None,
) -> str:
    """Which code `attention` with these arguments runs, and why. Raises ValueError where no kernel serves them."""
    return str(choose(q, k, v, mask, precision=precision, sparsity=sparsity, scale=scale))


def choose(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    *,
    precision: Precision = "dense",
    sparsity: Sparsity | None = None,
    scale: float | None = None,
) -> Choice:
    """The decision behind `attention` and `explain`. Raises ValueError where no kernel serves the arguments."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    checked_scale(q, k, v, mask, scale)  # before any kernel is looked for: also for those that run without its checks
    if sparsity is not None:
        return _sparse(q, k, v, mask, precision, sparsity, scale)
    if precision == "dense":
        return _dense(q, k, v, mask, scale)
    row, operation = LOW_PRECISION[precision]
    body = "its PyTorch reference" if runtime.mode(q) == "reference" else _kernel(q, k, v, mask, row)
    return Choice(partial(operation, q, k, v, mask, scale), f"{precision} attention", body, _place(q))


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Choice:
    operation = "dense attention"
    kernel = partial(dense_attention, q, k, v, mask, scale)
    if runtime.mode(q) == "reference":
        return Choice(kernel, operation, SDPA, _place(q))
    try:
        return Choice(kernel, operation, _kernel(q, k, v, mask, "dense_forward"), _place(q))
    except ValueError as obstacle:
        return Choice(partial(fast_attention, q, k, v, mask, scale), operation, SDPA, str(obstacle))


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, precision: Precision, sparsity: Sparsity, scale: float | None
) -> Choice:
    if precision != "dense":
        raise ValueError(
            f"sparse attention computes in the type of q: no {precision} kernel leaves out keys or queries"
        )
    if mask is not None:
        raise ValueError(
            "sparse attention takes no mask: closed keys go into the `lengths` of a BlockMask, or out of k"
        )
    if isinstance(sparsity, BlockMask):
        row, operation, run = "block_sparse_forward", "block-sparse attention", block_sparse_attention
        call = partial(run, q, k, v, sparsity, scale)
    else:
        row, operation, run = "region", "region attention", sparsity.region.attention
        call = partial(run, q, k, v, sparsity.k_cache, sparsity.v_cache, sparsity.tiles, scale)
    body = "its PyTorch reference" if runtime.mode(q) == "reference" else _kernel(q, k, v, None, row)
    return Choice(lambda: call()[0], operation, body, _place(q))


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, row: str) -> str:
    """The kernel behind a row of the launch table, in words.

    Raises ValueError if the kernel cannot take q, or if autograd would ask for a gradient that no kernel computes.
    """
    if q.dtype not in KERNEL_TYPES:
        raise ValueError(f"kernels compute in float16, bfloat16 or float32, and q is {_name(q.dtype)}")
    arch = runtime.architecture(q.device)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    for kernel in (row, *(BACKWARD.get(row, ()) if trains else ())):
        launch(row_of(kernel, q.dtype, mask is not None), arch, q.shape[-1])
    if runtime.mode(q) == "interpret":
        return "an interpreted Triton kernel"
    return f"a Triton kernel for sm_{arch}{_form(q, k, v, mask, row, trains)}"


def _form(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, row: str, trains: bool) -> str:
    """Of a kernel with two forms, which one serves these tensors and why it is not the other."""
    if row == "dense_forward":
        from diffusion_opt.kernels.attention.dense import specialized  # Triton exists on Linux only

        reason = specialized.why_not(q, k, v, mask)
        return ", its warps specialized" if reason is None else f", its warps all of one kind ({reason})"
    if row == "fp4_forward":
        from diffusion_opt.kernels.attention.fp4 import blackwell

        reason = blackwell.why_not(q, k, mask, trains)
        return " on FP4 matrix units" if reason is None else f" that simulates FP4 ({reason})"
    return ""


def _place(q: Tensor) -> str:
    where = runtime.mode(q)
    if where == "reference":
        return "q is on a CPU, where Triton kernels do not run"
    if where == "interpret":
        return "this is inside interpreted()"
    return f"q is a CUDA tensor of {_name(q.dtype)} with heads of {q.shape[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
