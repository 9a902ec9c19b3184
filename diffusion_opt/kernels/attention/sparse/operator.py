"""Attention over listed tiles: one operator for every sparse pattern, with a gradient.

    out, lse = block_sparse_attention(q, k, v, mask)           # softmax(scale q k^T) v over the tiles of the mask

`mask` is a `BlockMask`: for each block of queries the list of key blocks it attends to. The kernel walks these lists,
so one compiled kernel serves sliding windows, radial bands, predicted and learned masks, and any sequence length. The
gradient of q walks the same lists, that of k and v the transposed ones, each program owning what it writes: no
atomics, the same bits every time. Queries without any key give 0 and lse -inf. Blocks larger than the launch table's
tile are cut (`BlockMask.refined`), so blocks of 6 x 8 x 8 tokens work as well as blocks of 64.

SpargeAttn and SLA compile one kernel for each sequence length or block size; FastVideo's VSA walks lists too, forward
and backward, for blocks of 64. FlashAttention's CuTe kernels take lists of full and of partial blocks of any size, with
a gradient, on sm_90 and sm_100, and reach more there than Triton can; flex_attention needs torch.compile.

On a CPU the operator is `oracle.py`, whose time falls with the density too.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import checked_scale
from diffusion_opt.kernels.attention.sparse import oracle as reference
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.launch import padded_head_dim

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def block_sparse_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: BlockMask,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """softmax(scale q k^T) v over the tiles of the mask, and the natural-log LSE; both have gradients in q, k and v.

    `scale` is 1 / sqrt(d) unless given. Raises ValueError if the mask is not made for these lengths, batch and heads,
    for a scale that is not positive, for q, k, v of different types, and, where a kernel would run, for heads above
    256 (float32: 128), for types other than float16, bfloat16 and float32, and for blocks whose sizes are no multiples
    of 16.
    """
    scale = checked_scale(q, k, v, None, scale)
    mask.check(q.shape[2], k.shape[2])
    mask.check_heads(*q.shape[:2])
    return attention_op(q, k, v, *mask.parts(), scale)


def check_kernel_can(q: Tensor) -> None:
    """Raise ValueError for heads and types that no kernel is made for."""
    padded_head_dim(q.shape[-1])
    if q.dtype not in KERNEL_TYPES:
        raise ValueError(f"the kernels compute in float16, bfloat16 or float32, got {q.dtype}; convert q, k and v")


@torch.library.custom_op("diffusion_opt::block_sparse_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, lengths: Tensor | None,
    num_columns: int, block_m: int, block_n: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse, for a mask in parts."""
    mask = BlockMask(indices, counts, num_columns, block_m, block_n, lengths)
    if runtime.mode(q) == "reference":
        return reference.block_sparse_attention(q, k, v, mask, scale)
    check_kernel_can(q)
    from diffusion_opt.kernels.attention.sparse.forward import forward  # Triton exists on Linux only

    return forward(q, k, v, mask, scale)


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, lengths: Tensor | None,
    num_columns: int, block_m: int, block_n: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=reference.wide(q.dtype))


@torch.library.custom_op("diffusion_opt::block_sparse_attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    indices: Tensor, counts: Tensor, lengths: Tensor | None,
    num_columns: int, block_m: int, block_n: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their layouts."""
    mask = BlockMask(indices, counts, num_columns, block_m, block_n, lengths)
    if runtime.mode(q) == "reference":
        return reference.block_sparse_attention_backward(grad_out, grad_lse, q, k, v, mask, scale)
    from diffusion_opt.kernels.attention.sparse.backward import backward

    return backward(grad_out, grad_lse, q, k, v, mask, out, lse, scale)


@attention_backward_op.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    indices: Tensor, counts: Tensor, lengths: Tensor | None,
    num_columns: int, block_m: int, block_n: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, indices, counts, lengths, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, indices, counts, lengths)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, grad_lse: Tensor) -> tuple:
    return *attention_backward_op(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


attention_op.register_autograd(_gradients, setup_context=_save_for_backward)
