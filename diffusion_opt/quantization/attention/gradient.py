"""Low-precision attention that can be trained through, in the three formats of the kernels.

    out = low_precision_attention(q, k, v, format="int8")        # also "fp8", "nvfp4"; q, k, v get gradients

The forward pass is the kernels' own (`int8_attention`, `fp8_attention`, `fp4_attention`), so training sees the bits
that inference will compute. The kernels have a gradient for NVFP4 only. The one here for the 8-bit formats follows the
same two rules (Attn-QAT, arXiv 2603.00040), rounding being passed straight through. With q', k', v' the rounded
operands, P = softmax(scale q' k'^T) and Pq its rounding,

    dV = Pq^T dO,   dS = P * (dO v'^T - delta),   dq = scale dS k',   dk = scale dS^T q',   delta_i = dO_i . (P v')_i

The scores are those of the rounded q and k, and delta is made with P and not with Pq, that is not with the output.
That is what autograd gives if each rounding, of P too, is written as x + (Q(x) - x).detach(). The usual gradient of
attention, from unrounded operands and delta = dO . O, belongs to another function, and training with it drifts.

Weights are rounded relative to the largest score met so far, over tiles of 128 keys, as the 8-bit kernels do; the mean
that smoothing takes off the keys is a constant, which is exact, since softmax does not see it. The backward pass is
plain PyTorch and holds all weights (b, h, lq, lk): meant for the models of this repository, not for long videos.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import Mask, checked_scale
from diffusion_opt.kernels.attention.eight_bit import fp8_attention, int8_attention
from diffusion_opt.kernels.attention.eight_bit.operator import half_values
from diffusion_opt.kernels.attention.eight_bit.oracle import LOG2_E, dequantize_tokens, masked
from diffusion_opt.kernels.attention.fp4 import fp4_attention
from diffusion_opt.kernels.quantizers.formats import E4M3_MAX, round_e4m3
from diffusion_opt.kernels.quantizers.oracle import (
    EIGHT_BIT_KEYS,
    KEY_GROUPS,
    QUERY_GROUPS,
    quantize_channels,
    quantize_tokens,
    smoothing_mean,
)

AttentionFormat = Literal["int8", "fp8", "nvfp4"]
_EIGHT_BIT = {"int8": int8_attention, "fp8": fp8_attention}


def low_precision_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    format: AttentionFormat,
    smooth: bool = True,
) -> Float[Tensor, "b h lq d"]:
    """softmax(scale q k^T + mask) v with q, k, v and the weights in a format, differentiable in q, k and v.

    `scale` is 1 / sqrt(d) unless given. `smooth` takes means off before rounding: of the keys, and in NVFP4 of blocks
    of 128 queries too. INT8 keeps weights and values in float16. Raises ValueError for another format, and for
    arguments that do not fit together.
    """
    check_format(format)
    if format == "nvfp4":
        return fp4_attention(q, k, v, mask, scale, smoothing="qk" if smooth else "none")
    return _EightBitAttention.apply(q, k, v, mask, checked_scale(q, k, v, mask, scale), format, smooth)


def check_format(format: str) -> None:
    """Raise ValueError unless attention has this format."""
    if format not in get_args(AttentionFormat):
        raise ValueError(
            f"the format of attention must be one of {', '.join(get_args(AttentionFormat))}, got {format!r}"
        )


class _EightBitAttention(torch.autograd.Function):
    """The kernels' 8-bit attention with the gradient of the module's head; operands are rounded again for it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, format: str, smooth: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.format, ctx.smooth = scale, format, smooth
        return _EIGHT_BIT[format](q, k, v, mask, scale, smooth_k=smooth)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        grads = _eight_bit_backward(grad_out.float(), q, k, v, mask, ctx.scale, ctx.format, ctx.smooth)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None, None, None


def _eight_bit_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, format: str, smooth: bool
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lk d"], Float[Tensor, "b h lk d"]]:
    """Gradients of q, k and v in float32."""
    queries, keys, values = _rounded_operands(q, k, v, format, smooth)
    p, rounded = _weights(masked(scale * queries @ keys.mT, mask, slice(None), k.shape[2]), format)
    grad_p = grad_out @ values.mT
    grad_scores = scale * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    return grad_scores @ keys, grad_scores.mT @ queries, rounded.mT @ grad_out


def _rounded_operands(
    q: Tensor, k: Tensor, v: Tensor, format: str, smooth: bool
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lk d"], Float[Tensor, "b h lk d"]]:
    """q', k' (without the mean of the keys) and v' in float32, as the kernels round them."""
    mean = smoothing_mean(k) if smooth else None
    queries = dequantize_tokens(quantize_tokens(q, format, QUERY_GROUPS["block"]), QUERY_GROUPS["block"], torch.float32)
    codes = quantize_tokens(k, format, KEY_GROUPS["block"], mean)
    keys = dequantize_tokens(codes, KEY_GROUPS["block"], torch.float32)
    if format == "int8":
        values = half_values(v)
        return queries, keys, values.codes.float() * values.scales[:, :, None]
    codes = quantize_channels(v)
    return queries, keys, codes.codes.float() * codes.scales[:, :, None]


def _weights(
    scores: Float[Tensor, "b h lq lk"], format: str
) -> tuple[Float[Tensor, "b h lq lk"], Float[Tensor, "b h lq lk"]]:
    """P and its rounding Pq; zeros in rows without a key."""
    num_keys = scores.shape[-1]
    tiles = F.pad(scores * LOG2_E, (0, -num_keys % EIGHT_BIT_KEYS), value=-torch.inf).unflatten(
        -1, (-1, EIGHT_BIT_KEYS)
    )
    peaks = tiles.amax(-1, keepdim=True).cummax(-2).values  # the largest score met so far, tile by tile
    origins = peaks.masked_fill(peaks == -torch.inf, 0)
    local = (tiles - origins).exp2()
    rounded = local.half().float() if format == "int8" else round_e4m3(E4M3_MAX * local) / E4M3_MAX
    factor = (peaks - origins[..., -1:, :]).exp2()
    norm = (local * factor).sum((-2, -1), keepdim=True)
    norm = norm.masked_fill(norm == 0, 1)
    return tuple((w * factor / norm).flatten(-2)[..., :num_keys] for w in (local, rounded))
