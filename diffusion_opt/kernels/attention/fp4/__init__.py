"""Attention in NVFP4, forward and backward: for inference and for quantization-aware training."""

from diffusion_opt.kernels.attention.fp4.operator import fp4_attention, fp4_attention_with_lse

__all__ = ["fp4_attention", "fp4_attention_with_lse"]
