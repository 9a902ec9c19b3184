"""FP4 attention and its gradient for quantization-aware training, in plain PyTorch.

Forward (SageAttention3, Zhang et al. 2025, arXiv 2505.11594): q, k, v are NVFP4 and so are the weights. Scores are

    S = scale (a b^T + m (k - kbar)^T),    a = Q(q - m),  b = Q(k - kbar),  m = mean of the query's block of 128

where Q is the rounding, and the second term gives back in high precision what smoothing q took off. Weights are rounded
in two levels, for each row in each tile of 64 keys: relative to the largest weight of that row and tile, then NVFP4
with blocks of 16 keys. (NVFP4 alone depends on the running maximum: shift it and most of the rounded weights change.
With the local one they do not, so a backward pass that meets tiles in another order rounds the same weights to the same
bits.)

    t_i = max_j S_ij over the tile,   Pq_ij = exp(t_i - lse_i) Q(2688 exp(S_ij - t_i)) / 2688,   O = Pq Q(v)

Backward (Attn-QAT, arXiv 2603.00040): rounding is passed straight through. With P the weights before rounding,

    dV = Pq^T dO,   dP = dO Q(v)^T,   dS = P * (dP - delta),   dq = scale dS b,   dk = scale dS^T (a + m)

and delta_i = sum_j P_ij dP_ij = dO_i . (P Q(v))_i: with P, not Pq. The usual shortcut delta = dO . O is wrong here, so
the forward pass also returns O_hp = P Q(v). The means and the term that is given back count as constants; for kbar that
is no approximation, since softmax does not see it. FastVideo's implementation has the shortcut as its default, and
averages keys over batch and heads too.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import Mask
from diffusion_opt.kernels.attention.eight_bit.oracle import masked
from diffusion_opt.kernels.quantizers.formats import (
    E2M1_MAX,
    E4M3_MIN,
    NVFP4_BLOCK,
    NVFP4_MAX,
    Nvfp4,
    round_e2m1,
    round_e4m3,
)
from diffusion_opt.kernels.quantizers.oracle import (
    KEY_BLOCK,
    QUERY_BLOCK,
    block_means,
    quantize_nvfp4,
    smoothing_mean,
)

Smoothing = Literal["none", "k", "qk"]


class Fp4Operands(NamedTuple):
    """What FP4 attention multiplies. Each `*_scales` has one number for each tile of tokens."""

    q: Float[Tensor, "b h lq d"]  # NVFP4 values, in blocks of 16 channels
    q_scales: Float[Tensor, "b h query_tiles"]  # tiles of 128
    q_mean: Float[Tensor, "b h query_tiles d"] | None
    k: Float[Tensor, "b h lk d"]
    k_scales: Float[Tensor, "b h key_tiles"]  # tiles of 64
    v: Float[Tensor, "b h lk d"]  # in blocks of 16 keys
    v_scales: Float[Tensor, "b h key_tiles"]
    given_back: Float[Tensor, "b h query_tiles lk"] | None  # m (k - kbar)^T, for smoothed q


def prepare(q: Tensor, k: Tensor, v: Tensor, smoothing: Smoothing) -> Fp4Operands:
    """Quantize q, k, v (b, h, l, d), in float32."""
    k_mean = None if smoothing == "none" else smoothing_mean(k)[:, :, None]
    q_mean = block_means(q) if smoothing == "qk" else None
    a = quantize_nvfp4(q, QUERY_BLOCK, "channels", q_mean)
    b = quantize_nvfp4(k, KEY_BLOCK, "channels", k_mean)
    c = quantize_nvfp4(v, KEY_BLOCK, "tokens")
    return Fp4Operands(*a, q_mean, *b, *c, correction(q_mean, k, k_mean))


def correction(q_mean: Tensor | None, k: Tensor, k_mean: Tensor | None) -> Float[Tensor, "b h tiles lk"] | None:
    """The scores, before scaling, that smoothing q took off: mean of the block times (k - kbar), float32."""
    return None if q_mean is None else q_mean @ (k.float() - k_mean).mT


def attention_fp4(
    x: Fp4Operands, mask: Mask | None, scale: float, kind: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"], Float[Tensor, "b h lq d"]]:
    """O, natural-log LSE of the quantized scores, and O_hp = P Q(v), computed in `kind`."""
    scores = _scores(x, mask, scale, kind)
    lse = scores.logsumexp(-1)
    p, rounded = _weights(scores, lse)
    v = _spread(Nvfp4(x.v, x.v_scales), KEY_BLOCK, kind)
    return rounded @ v, lse, p @ v


def attention_fp4_backward(
    grad_out: Float[Tensor, "b h lq d"],
    x: Fp4Operands,
    mask: Mask | None,
    scale: float,
    delta: Float[Tensor, "b h lq"],
    lse: Float[Tensor, "b h lq"],
    kind: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lk d"], Float[Tensor, "b h lk d"]]:
    """Gradients of q, k, v from delta = dO . O_hp and the LSE of the quantized scores."""
    grad_out = grad_out.to(kind)
    p, rounded = _weights(_scores(x, mask, scale, kind), lse.to(kind))
    v = _spread(Nvfp4(x.v, x.v_scales), KEY_BLOCK, kind)
    grad_scores = p * (grad_out @ v.mT - delta.to(kind)[..., None]) * scale
    dq = grad_scores @ _spread(Nvfp4(x.k, x.k_scales), KEY_BLOCK, kind)
    return dq, grad_scores.mT @ _dequantized_queries(x, kind), rounded.mT @ grad_out


def straight_through_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None,
    scale: float,
    smoothing: Smoothing,
) -> Float[Tensor, "b h lq d"]:
    """O again, as a graph that autograd differentiates: each rounding is x + (Q(x) - x).detach(). In q's type."""
    with torch.no_grad():
        x = prepare(q, k, v, smoothing)
        queries = _dequantized_queries(x, q.dtype)
        keys = _spread(Nvfp4(x.k, x.k_scales), KEY_BLOCK, q.dtype)
        values = _spread(Nvfp4(x.v, x.v_scales), KEY_BLOCK, q.dtype)
        constant = _scores(x, None, scale, q.dtype) - scale * queries @ keys.mT
    scores = scale * _straight_through(q, queries) @ _straight_through(k, keys).mT + constant
    scores = masked(scores, mask, slice(None), k.shape[2])
    p, rounded = _weights(scores, scores.logsumexp(-1))
    return _straight_through(p, rounded) @ _straight_through(v, values)


def round_weights(p: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """Weights of a tile, the largest of a row being 1, in NVFP4 at 2688 to 1: the second level of the two.

    The values are returned as they are multiplied, 2688 times the weights; n is a multiple of 16.
    """
    blocks = (NVFP4_MAX * p).unflatten(-1, (-1, NVFP4_BLOCK))
    scales = round_e4m3((blocks.amax(-1, keepdim=True) / E2M1_MAX).clamp(min=E4M3_MIN))
    return (round_e2m1(blocks * (1 / scales)) * scales).flatten(-2)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def _spread(x: Nvfp4, tile: int, kind: torch.dtype) -> Float[Tensor, "b h l d"]:
    """Values times the scale of their tile."""
    scales = x.scales.to(kind).repeat_interleave(tile, -1)[..., : x.values.shape[2]]
    return x.values.to(kind) * scales[..., None]


def _dequantized_queries(x: Fp4Operands, kind: torch.dtype) -> Float[Tensor, "b h lq d"]:
    """a + m."""
    queries = _spread(Nvfp4(x.q, x.q_scales), QUERY_BLOCK, kind)
    if x.q_mean is None:
        return queries
    return queries + x.q_mean.to(kind).repeat_interleave(QUERY_BLOCK, 2)[:, :, : queries.shape[2]]


def _scores(x: Fp4Operands, mask: Mask | None, scale: float, kind: torch.dtype) -> Float[Tensor, "b h lq lk"]:
    queries = _spread(Nvfp4(x.q, x.q_scales), QUERY_BLOCK, kind)
    scores = queries @ _spread(Nvfp4(x.k, x.k_scales), KEY_BLOCK, kind).mT
    if x.given_back is not None:
        scores = scores + x.given_back.to(kind).repeat_interleave(QUERY_BLOCK, 2)[:, :, : queries.shape[2]]
    return masked(scores * scale, mask, slice(None), x.k.shape[2])


def _weights(scores: Tensor, lse: Tensor) -> tuple[Float[Tensor, "b h lq lk"], Float[Tensor, "b h lq lk"]]:
    """P and its rounding Pq; zeros in rows without a key."""
    num_keys = scores.shape[-1]
    tiles = F.pad(scores, (0, -num_keys % KEY_BLOCK), value=-torch.inf).unflatten(-1, (-1, KEY_BLOCK))
    peak = tiles.amax(-1, keepdim=True).detach()
    local = (tiles - peak.masked_fill(peak == -torch.inf, 0)).exp()
    total = lse.masked_fill(lse == -torch.inf, 0)[..., None, None]
    factor = (peak - total.detach()).exp()
    p = (tiles - total).exp()
    rounded = round_weights(local.detach()) / NVFP4_MAX * factor
    return p.flatten(-2)[..., :num_keys], rounded.flatten(-2)[..., :num_keys]
