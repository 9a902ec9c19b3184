"""FP4 attention with a gradient for quantization-aware training, as operators of torch.

    out = fp4_attention(q, k, v)                     # (b, h, lq, d): differentiable, everything in NVFP4
    out = fp4_attention(q, k, v, smoothing="qk")     # for models that were not trained with it (SageAttention3)

`oracle.py` has the formulas and papers. Training with the roundings in place (Attn-QAT) lets a model get used to
them, which is what makes FP4 usable where INT8 needs no training; it works without smoothing, and with it. Saved for
the backward pass are q, k, v, the LSE and O_hp in float32; the operands are quantized again, to the same bits.

The result has the same bits of q, k, v and weights on every machine, FP4 hardware or not: CPU users get them from
PyTorch, GPU users from the Triton kernels. Where a GPU has FP4 matrix units and `blackwell.obstacle` finds nothing
wrong with them, they compute calls without mask and gradient; elsewhere FP4 is simulated, at the time of attention in
bfloat16 and more: for training and measuring.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import Mask, checked_scale, expanded_mask
from diffusion_opt.kernels.attention.eight_bit.int8 import smoothing_share
from diffusion_opt.kernels.attention.fp4 import oracle as reference
from diffusion_opt.kernels.attention.fp4.oracle import Fp4Operands, Smoothing
from diffusion_opt.kernels.attention.fp4.packed import pack
from diffusion_opt.kernels.quantizers.operator import quantize_nvfp4
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK, QUERY_BLOCK, block_means, smoothing_mean


def fp4_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    smoothing: Smoothing = "qk",
) -> Float[Tensor, "b h lq d"]:
    """softmax(scale q k^T + mask) v with q, k, v and the weights in NVFP4; `scale` is 1 / sqrt(d) unless given.

    `smoothing` takes means off before rounding: of the keys ("k"), and of blocks of 128 queries too ("qk").
    The gradient is straight through every rounding. Raises ValueError for arguments that do not fit, heads above 256.
    """
    scale = checked_scale(q, k, v, mask, scale)
    return fp4_op(q, k, v, expanded_mask(mask, q, k), scale, smoothing, _trains(q, k, v))[0]


def fp4_attention_with_lse(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    smoothing: Smoothing = "qk",
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """`fp4_attention` and the float32 natural log-sum-exp of each query's scores, -inf where every key is masked.

    The log-sum-exp carries no gradient.
    """
    scale = checked_scale(q, k, v, mask, scale)
    out, lse, _ = fp4_op(q, k, v, expanded_mask(mask, q, k), scale, smoothing, _trains(q, k, v))
    if smoothing == "none":
        return out, lse.detach()
    return out, lse.detach() + smoothing_share(q.detach(), smoothing_mean(k.detach()), scale)


def prepare(q: Tensor, k: Tensor, v: Tensor, smoothing: Smoothing) -> Fp4Operands:
    """`reference.prepare` by the kernels where there are any; values have the type of q, k and v."""
    k_mean = None if smoothing == "none" else smoothing_mean(k)[:, :, None]
    q_mean = block_means(q) if smoothing == "qk" else None
    a = quantize_nvfp4(q, QUERY_BLOCK, "channels", q_mean)
    b = quantize_nvfp4(k, KEY_BLOCK, "channels", k_mean)
    c = quantize_nvfp4(v, KEY_BLOCK, "tokens")
    return Fp4Operands(*a, q_mean, *b, *c, reference.correction(q_mean, k, k_mean))


@torch.library.custom_op("diffusion_opt::fp4_attention", mutates_args=())
def fp4_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, smoothing: str, trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE of the quantized scores, and O_hp (float32; empty unless `trains`); `mask` is expanded."""
    out = torch.empty_like(q)
    out_hp = q.new_empty(q.shape if trains else (0,), dtype=torch.float32)
    if q.is_cuda:
        from diffusion_opt.kernels.attention.fp4 import blackwell  # Triton exists on Linux only

        choice = blackwell.served(q, k, mask, trains)
        if choice is not None:
            return out, blackwell.forward(pack(q, k, v, smoothing), scale, out, k.shape[2], choice), out_hp
    x = prepare(q, k, v, smoothing)
    if runtime.mode(q) == "reference":
        result, lse, exact = reference.attention_fp4(x, mask, scale)
        return out.copy_(result), lse, exact if trains else out_hp
    from diffusion_opt.kernels.attention.fp4.forward import forward

    return out, forward(x, mask, scale, out, out_hp if trains else None), out_hp


@fp4_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, smoothing: str, trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    floats = {"dtype": torch.float32}
    return torch.empty_like(q), q.new_empty(q.shape[:3], **floats), q.new_empty(q.shape if trains else (0,), **floats)


@torch.library.custom_op("diffusion_opt::fp4_attention_backward", mutates_args=())
def fp4_backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, smoothing: str,
    out_hp: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous gradients of q, k and v."""
    x = prepare(q, k, v, smoothing)
    delta = (grad_out.float() * out_hp).sum(-1)
    if runtime.mode(q) == "reference":
        grads = reference.attention_fp4_backward(grad_out, x, mask, scale, delta, lse)
        return tuple(grad.to(q.dtype).contiguous() for grad in grads)
    from diffusion_opt.kernels.attention.fp4.backward import backward

    return backward(grad_out, x, mask, scale, delta, lse)


@fp4_backward_op.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, smoothing: str,
    out_hp: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, mask, ctx.scale, ctx.smoothing, _ = inputs
    _, lse, out_hp = output
    ctx.save_for_backward(q, k, v, mask, out_hp, lse)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, *_unused: Tensor | None) -> tuple:
    q, k, v, mask, out_hp, lse = ctx.saved_tensors
    grads = fp4_backward_op(grad_out, q, k, v, mask, ctx.scale, ctx.smoothing, out_hp, lse)
    return *grads, None, None, None, None


fp4_op.register_autograd(_gradients, setup_context=_save_for_backward)


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
