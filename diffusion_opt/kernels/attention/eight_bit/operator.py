"""Attention on 8-bit codes as an operator of torch; `int8.py` and `fp8.py` quantize and call it.

The operator takes codes and scales, not q, k, v, so that a caller who keeps keys quantized (a cache over denoising
steps) pays for quantization once. INT8 or FP8 scores follow from the type of the codes. On a CPU it is the plain
PyTorch of `oracle.py`, which rounds weights over tiles of 128 keys. That is the tile of sm_90 for heads of up to 128
numbers without a mask. With a mask, and on other GPUs, tiles are of 64 keys or 32 (`launch.py`), where weights are
rounded against another running maximum: `oracle.attention_8bit` with that `key_tile` is the reference there.

There is no gradient: these are for inference. Training under quantization is `fp4/operator.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import Mask
from diffusion_opt.kernels.attention.eight_bit import oracle as reference
from diffusion_opt.kernels.attention.eight_bit.oracle import ValuesIn
from diffusion_opt.kernels.quantizers.operator import largest_of_channels
from diffusion_opt.kernels.quantizers.oracle import EIGHT_BIT_KEYS, Granularity, Quantized

HALF_MAX = torch.finfo(torch.float16).max


def attention_on_codes(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    mask: Mask | None,
    scale: float,
    granularity: Granularity,
    values_in: ValuesIn,
    like: Float[Tensor, "b h lq d"],
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """Output with type and strides of `like`, and float32 natural-log LSE of the quantized scores.

    `granularity` is the one q and k were quantized with; `mask` broadcasts to (b, h, lq, lk).
    """
    wide = None if mask is None else mask.expand(*like.shape[:3], k.codes.shape[2])
    return eight_bit_op(*q, *k, *v, wide, scale, granularity, values_in, like)


def half_values(v: Float[Tensor, "b h l d"], sums: bool = False) -> Quantized:
    """Values for the float16 kinds, and the power of two that each channel was divided by to fit.

    It is 1 unless a channel has numbers beyond 65504, or with `sums` (`fp16_fast`) unless a tile of keys could sum to
    more than that: division by a power of two changes no bit of what stays above float16's smallest numbers.
    """
    largest = largest_of_channels(v)
    most = HALF_MAX / EIGHT_BIT_KEYS if sums else HALF_MAX
    power = (largest / most).log2().ceil().clamp(min=0).exp2()
    power = torch.where(largest.isfinite(), power, 1.0)  # infinities and NaN stay what they are
    return Quantized((v.float() / power[:, :, None]).to(torch.float16), power)


@torch.library.custom_op("diffusion_opt::eight_bit_attention", mutates_args=())
def eight_bit_op(
    q: Tensor, q_scales: Tensor, k: Tensor, k_scales: Tensor, v: Tensor, v_scales: Tensor, mask: Tensor | None,
    scale: float, granularity: str, values_in: str, like: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; `mask` is expanded to (b, h, lq, lk)."""
    out = torch.empty_like(like)
    if runtime.mode(q) == "reference":
        operands = (Quantized(q, q_scales), Quantized(k, k_scales), Quantized(v, v_scales))
        result, lse = reference.attention_8bit(*operands, mask, scale, granularity, values_in, EIGHT_BIT_KEYS)
        return out.copy_(result), lse
    from diffusion_opt.kernels.attention.eight_bit.forward import forward  # Triton exists on Linux only

    return out, forward(q, q_scales, k, k_scales, v, v_scales, mask, scale, granularity, values_in, out)


@eight_bit_op.register_fake
def _(
    q: Tensor, q_scales: Tensor, k: Tensor, k_scales: Tensor, v: Tensor, v_scales: Tensor, mask: Tensor | None,
    scale: float, granularity: str, values_in: str, like: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(like), like.new_empty(like.shape[:3], dtype=torch.float32)
