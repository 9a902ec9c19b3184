"""Dense attention with a gradient: the Triton kernels as operators of torch.

    out = dense_attention(q, k, v, mask)                       # (b, h, lq, d), any head dimension up to 256
    out, lse = dense_attention_with_lse(q, k, v, mask)         # lse (b, h, lq): partial results can be merged exactly

Layout (b, h, l, d) with any strides: a transposed view of (b, l, h, d) is read in place, and the output has the strides
of `q`. Lengths of queries and keys may differ. A mask is bool (True is open) or a bias, and broadcasts to
(b, h, lq, lk) without being copied. A query with every key masked gives zeros.

The kernels are registered as custom operators (`torch.ops.diffusion_opt.dense_attention`) with a shape rule and a
gradient, so autograd, `torch.compile` and fake tensors see an ordinary operator. On a CPU the public functions take
torch's `scaled_dot_product_attention` or, for the lse, the formula (`oracle.py`), and the operators the
formula; interpreted kernels run only where TRITON_INTERPRET asked for them (`runtime.py`).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import Mask, checked_scale, expanded_mask
from diffusion_opt.kernels.attention.dense import oracle as reference
from diffusion_opt.kernels.launch import padded_head_dim

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def dense_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h lq d"]:
    """softmax(scale q k^T + mask) v; `scale` is 1 / sqrt(d) unless given.

    Raises ValueError for shapes or types that do not fit, a scale that is not positive, a mask that wants a gradient
    (none is computed), and, where a kernel would run, for types other than float16, bfloat16 and float32 and for heads
    above 256, in float32 above 128 (`launch.py`; `attention/door.py` takes torch's attention there).
    """
    scale = checked_scale(q, k, v, mask, scale)
    if runtime.mode(q) == "reference":
        return reference.fast_attention(q, k, v, mask, scale)
    return attention_op(q, k, v, expanded_mask(mask, q, k), scale)[0]


def dense_attention_with_lse(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """`dense_attention` and the natural log-sum-exp of each query's scores, -inf for a query with every key masked.

    The lse is float32 (float64 for float64 inputs) and has a gradient. Raises what `dense_attention` raises.
    """
    scale = checked_scale(q, k, v, mask, scale)
    return attention_op(q, k, v, expanded_mask(mask, q, k), scale)


@torch.library.custom_op("diffusion_opt::dense_attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and lse; `mask` is expanded to (b, h, lq, lk)."""
    if runtime.mode(q) == "reference":
        wide = _lse_type(q)
        out, lse = reference.attention(q.to(wide), k.to(wide), v.to(wide), mask, scale)
        return torch.empty_like(q).copy_(out), lse.contiguous()
    _check_kernel_can(q)
    from diffusion_opt.kernels.attention.dense import forward, specialized  # Triton exists on Linux only

    choice = specialized.served(q, k, v, mask) if q.is_cuda else None  # interpreted warps are all of one kind
    if choice is not None:
        return specialized.forward(q, k, v, scale, choice)
    return forward.forward(q, k, v, mask, scale)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_lse_type(q))


@torch.library.custom_op("diffusion_opt::dense_attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous gradients of q, k and v."""
    if runtime.mode(q) == "reference":
        wide = [x.to(_lse_type(q)) for x in (grad_out, grad_lse, q, k, v)]
        return tuple(grad.to(q.dtype).contiguous() for grad in reference.attention_backward(*wide, mask, scale))
    from diffusion_opt.kernels.attention.dense.backward import backward

    return backward(grad_out, grad_lse, q, k, v, mask, out, lse, scale)


@attention_backward_op.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, grad_lse: Tensor) -> tuple:
    q, k, v, mask, out, lse = ctx.saved_tensors
    return *attention_backward_op(grad_out, grad_lse, q, k, v, mask, out, lse, ctx.scale), None, None


attention_op.register_autograd(_gradients, setup_context=_save_for_backward)


def _lse_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _check_kernel_can(q: Tensor) -> None:
    padded_head_dim(q.shape[-1])
    if q.dtype not in KERNEL_TYPES:
        raise ValueError(f"the kernels compute in float16, bfloat16 or float32, got {q.dtype}; convert q, k and v")
