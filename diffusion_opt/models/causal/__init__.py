"""Video transformers of diffusers made causal: a chunk at a time, with a key-value cache, on the stock classes."""

from diffusion_opt.models.causal.clip_model import ClipModel, ClipWords
from diffusion_opt.models.causal.codec import TubeAutoencoder
from diffusion_opt.models.causal.key_values import ChunkCache
from diffusion_opt.models.causal.layout import Layout, kept
from diffusion_opt.models.causal.ltx2 import CausalLTX2
from diffusion_opt.models.causal.stream import Stream, stream
from diffusion_opt.models.causal.wan import CausalWan

__all__ = [
    "CausalLTX2",
    "CausalWan",
    "ChunkCache",
    "ClipModel",
    "ClipWords",
    "Layout",
    "Stream",
    "TubeAutoencoder",
    "kept",
    "stream",
]
