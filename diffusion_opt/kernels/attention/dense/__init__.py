"""Dense attention with its gradient, in 16 bits and float32."""

from diffusion_opt.kernels.attention.dense.operator import dense_attention, dense_attention_with_lse

__all__ = ["dense_attention", "dense_attention_with_lse"]
