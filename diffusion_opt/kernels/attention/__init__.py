"""Attention: dense, in 8 and 4 bits, over listed tiles, and of active tokens against a cache.

`attention` is the one door and `explain` says which code it takes; `door.py` has both. The folders can be used alone.
"""

from diffusion_opt.kernels.attention.door import (
    LOW_PRECISION,
    CachedRegion,
    Choice,
    Precision,
    Sparsity,
    attention,
    choose,
    explain,
)

__all__ = ["LOW_PRECISION", "CachedRegion", "Choice", "Precision", "Sparsity", "attention", "choose", "explain"]
