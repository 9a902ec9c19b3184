"""Attention of the active tokens against a cache of all keys and values."""

from diffusion_opt.kernels.attention.region.operator import Region

__all__ = ["Region"]
