"""What dense attention must compute, written twice in PyTorch: as the formula, and fast.

    O = softmax(S) V,  lse = log sum exp S,     S = sigma Q K^T + bias,     sigma = 1 / sqrt(d) unless given

`attention` is the formula, in whatever type it is given: in float64 it is the oracle the kernels are held to.
`attention_backward` is its gradient (Dao et al. 2022, FlashAttention, arXiv 2205.14135, appendix B):

    P = exp(S - lse)                        D = rowsum(dO * O) - dlse
    dV = P^T dO      dS = P * (dO V^T - D)      dQ = sigma dS K      dK = sigma dS^T Q

`fast_attention` is torch's fused `scaled_dot_product_attention` and serves users without a GPU. All three share what
SDPA leaves to the backend: a query with every key masked gives zeros and receives zero gradient, and its lse is -inf.
A bias below -2.3e38 masks, like -inf: `torch.finfo(...).min` is a common way to say so, and it must not turn an empty
row into the mean of all values.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import Mask, closed_keys


def attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """Output and log-sum-exp of the scores by the formula, in the type of `q`; `mask` broadcasts to (b, h, lq, lk)."""
    scores = _scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    return _weights(scores, lse) @ v, lse


def attention_backward(
    grad_out: Float[Tensor, "b h lq d"],
    grad_lse: Float[Tensor, "b h lq"],
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lk d"], Float[Tensor, "b h lk d"]]:
    """Gradients of q, k and v by the formula; `grad_lse` is the gradient that arrives at lse."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _scores(q, k, mask, scale)
    weights = _weights(scores, scores.logsumexp(-1))
    out = weights @ v
    centered = grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True) + grad_lse.to(q.dtype).unsqueeze(-1)
    grad_scores = weights * centered
    return scale * grad_scores @ k, scale * grad_scores.mT @ q, weights.mT @ grad_out


def fast_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h lq d"]:
    """The same output by torch's fused attention. Empty rows are opened for SDPA and closed in its result."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    mask = torch.atleast_2d(mask)
    closed = closed_keys(mask).expand(*mask.shape[:-1], k.shape[-2])
    empty = closed.all(-1, keepdim=True)
    if mask.dtype == torch.bool:
        return F.scaled_dot_product_attention(q, k, v, ~closed | empty, scale=scale).masked_fill(empty, 0)
    wide = torch.promote_types(q.dtype, mask.dtype)  # SDPA wants one type, and a bias of -1e5 is -inf in float16
    bias = mask.to(wide).masked_fill(closed, -float("inf")).masked_fill(empty, 0)
    out = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), bias, scale=scale)
    return out.masked_fill(empty, 0).to(q.dtype)


def _scores(q: Tensor, k: Tensor, mask: Mask | None, scale: float | None) -> Float[Tensor, "b h lq lk"]:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return scores
    closed = closed_keys(mask)
    if mask.dtype != torch.bool:
        scores = scores + mask.masked_fill(closed, 0).to(scores.dtype)
    return scores.masked_fill(closed, -float("inf"))


def _weights(scores: Tensor, lse: Tensor) -> Float[Tensor, "b h lq lk"]:
    """exp(S - lse), and 0 rather than NaN in a row where both are -inf."""
    return (scores - lse.masked_fill(lse == -float("inf"), 0).unsqueeze(-1)).exp()
