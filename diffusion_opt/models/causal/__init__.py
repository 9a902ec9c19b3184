"""Video transformers of diffusers made causal: a chunk at a time, with a key-value cache, on the stock classes."""

from diffusion_opt.models.causal.key_values import ChunkCache
from diffusion_opt.models.causal.layout import Layout, kept
from diffusion_opt.models.causal.wan import CausalWan

__all__ = ["CausalWan", "ChunkCache", "Layout", "kept"]
