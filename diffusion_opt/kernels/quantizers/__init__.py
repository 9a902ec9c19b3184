"""From 16 bits to 8 and 4: the quantizers of q, k and v, and the number formats."""

from diffusion_opt.kernels.quantizers.operator import quantize_channels, quantize_nvfp4, quantize_tokens

__all__ = ["quantize_channels", "quantize_nvfp4", "quantize_tokens"]
