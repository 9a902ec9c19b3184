"""INT8 attention (SageAttention): scores from 8-bit integers, with the mean of the keys taken off first.

    out = int8_attention(q, k, v)                                            # values in float16
    out = int8_attention(q, k, v, granularity="thread", values_in="fp8")     # SageAttention2

(Zhang et al. 2024, arXiv 2410.02367 and 2411.10958.) Where k has channels with a large mean, as in most trained
transformers, its few codes go to the mean and nothing is left for what tells keys apart. Softmax does not see a vector
that all keys lose:

    softmax_j(q . (k_j - m)) = softmax_j(q . k_j),        lse = lse' + scale q . m

so m = mean_j k_j is subtracted before rounding and the lse put right after it. Masks, heads up to 256, any lengths and
strides, and queries without a key work as in dense attention; SageAttention has head dimensions 64 and 128 and, in most
of its kernels, no mask. Quantizing reads q and k once more: that time grows with the tokens, attention's with their
square.
"""

from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import Mask, checked_scale
from diffusion_opt.kernels.attention.eight_bit.operator import attention_on_codes, half_values
from diffusion_opt.kernels.attention.eight_bit.oracle import ValuesIn
from diffusion_opt.kernels.quantizers.operator import quantize_channels, quantize_tokens
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS, Granularity, smoothing_mean


def int8_attention(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    granularity: Granularity = "block",
    values_in: ValuesIn = "fp16",
    smooth_k: bool = True,
) -> Float[Tensor, "b h lq d"]:
    """softmax(scale q k^T + mask) v with q and k in INT8; `scale` is 1 / sqrt(d) unless given.

    `granularity` says how many tokens share a scale ("block": 128 queries, 128 keys; "thread": 4 and 16), `values_in`
    in what weights and v are multiplied ("fp8" needs sm_89). Raises ValueError for arguments that do not fit, heads
    above 256 and, on a GPU, types that the architecture lacks.
    """
    return _attend(q, k, v, mask, checked_scale(q, k, v, mask, scale), granularity, values_in, smooth_k)[0]


def int8_attention_with_lse(
    q: Float[Tensor, "b h lq d"],
    k: Float[Tensor, "b h lk d"],
    v: Float[Tensor, "b h lk d"],
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    granularity: Granularity = "block",
    values_in: ValuesIn = "fp16",
    smooth_k: bool = True,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """`int8_attention` and the float32 natural log-sum-exp of each query's scores, -inf where every key is masked."""
    scale = checked_scale(q, k, v, mask, scale)
    out, lse, mean = _attend(q, k, v, mask, scale, granularity, values_in, smooth_k)
    return out, lse if mean is None else lse + smoothing_share(q, mean, scale)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, granularity: Granularity, values_in: ValuesIn,
    smooth_k: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Output, LSE of the quantized scores, and the mean taken off the keys."""
    mean = smoothing_mean(k) if smooth_k else None
    queries = quantize_tokens(q, "int8", QUERY_GROUPS[granularity])
    keys = quantize_tokens(k, "int8", KEY_GROUPS[granularity], mean)
    values = quantize_channels(v) if values_in == "fp8" else half_values(v, sums=values_in == "fp16_fast")
    return *attention_on_codes(queries, keys, values, mask, scale, granularity, values_in, q), mean


def smoothing_share(q: Float[Tensor, "b h l d"], mean: Float[Tensor, "b h d"], scale: float) -> Float[Tensor, "b h l"]:
    """What every score of a query lost when the mean was taken off the keys: scale q . mean, float32."""
    return (q.float() @ mean[..., None]).squeeze(-1) * scale
