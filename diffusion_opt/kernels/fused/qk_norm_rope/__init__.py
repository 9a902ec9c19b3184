"""RMS norm and rotary embedding of q and k, and their 8-bit codes, in one pass."""

from diffusion_opt.kernels.fused.qk_norm_rope.operator import (
    qk_norm_rope,
    qk_norm_rope_quantized,
    qk_norm_rope_with_mean,
)

__all__ = ["qk_norm_rope", "qk_norm_rope_quantized", "qk_norm_rope_with_mean"]
