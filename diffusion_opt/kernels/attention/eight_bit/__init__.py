"""Attention whose scores are products of 8-bit codes: INT8 or FP8, with values in float16 or FP8."""

from diffusion_opt.kernels.attention.eight_bit.fp8 import fp8_attention, fp8_attention_with_lse
from diffusion_opt.kernels.attention.eight_bit.int8 import int8_attention, int8_attention_with_lse, smoothing_share

__all__ = ["fp8_attention", "fp8_attention_with_lse", "int8_attention", "int8_attention_with_lse", "smoothing_share"]
