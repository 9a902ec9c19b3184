"""Adaptive normalization, with and without the gated residual before it."""

from diffusion_opt.kernels.fused.modulate.operator import gated_modulate, modulate

__all__ = ["gated_modulate", "modulate"]
