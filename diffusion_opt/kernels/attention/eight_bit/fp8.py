"""FP8 attention: queries, keys, weights and values all in e4m3.

    out = fp8_attention(q, k, v)

Both products run on 8-bit matrix units: twice the peak of bfloat16 from sm_89 on. Three bits of mantissa leave a
relative error of up to 1/16 a number, which averages out over a head but does not go away, so scales are as local as
they can be without cost: blocks of 128 queries and 128 keys, single channels of v, and each query's own largest score
for the weights. FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) and modelopt have one scale for a tensor and no
smoothing, and suffer when k has channels with a large mean; here the mean of the keys is taken off as in
`int8.py`.

INT8 scores are more exact than e4m3 scores at the same peak, except on sm_100, where Triton 3.7 multiplies integers on
the units of older GPUs. FP8 scores are for that, and for blocks of keys of very different size.
"""

from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import Mask, checked_scale
from diffusion_opt.kernels.attention.eight_bit.int8 import smoothing_share
from diffusion_opt.kernels.attention.eight_bit.operator import attention_on_codes
from diffusion_opt.kernels.quantizers.operator import quantize_channels, quantize_tokens
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS, smoothing_mean


def fp8_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    smooth_k: bool = True,
) -> Float[Tensor, "b h lq d"]:
    """softmax(scale q k^T + mask) v with all factors in e4m3; `scale` is 1 / sqrt(d) unless given.

    Raises ValueError for arguments that do not fit, heads above 256, and GPUs before sm_89, which have no e4m3.
    """
    return _attend(q, k, v, mask, checked_scale(q, k, v, mask, scale), smooth_k)[0]


def fp8_attention_with_lse(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    smooth_k: bool = True,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """`fp8_attention` and the float32 natural log-sum-exp of each query's scores, -inf where every key is masked."""
    scale = checked_scale(q, k, v, mask, scale)
    out, lse, mean = _attend(q, k, v, mask, scale, smooth_k)
    return out, lse if mean is None else lse + smoothing_share(q, mean, scale)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, smooth_k: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, LSE of the quantized scores, and the mean taken off the keys."""
    mean = smoothing_mean(k) if smooth_k else None
    queries = quantize_tokens(q, "fp8", QUERY_GROUPS["block"])
    keys = quantize_tokens(k, "fp8", KEY_GROUPS["block"], mean)
    return *attention_on_codes(queries, keys, quantize_channels(v), mask, scale, "block", "fp8", q), mean
