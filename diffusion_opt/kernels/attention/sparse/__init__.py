"""Attention over listed tiles, the masks that list them, and how tokens are packed into tiles."""

from diffusion_opt.kernels.attention.sparse.coarse_to_fine import coarse_to_fine_attention
from diffusion_opt.kernels.attention.sparse.masks import BlockMask, radial, sliding_tile
from diffusion_opt.kernels.attention.sparse.operator import block_sparse_attention
from diffusion_opt.kernels.attention.sparse.packing import TokenTiles, token_tiles
from diffusion_opt.kernels.attention.sparse.predicted_masks import predicted_mask

__all__ = [
    "BlockMask",
    "TokenTiles",
    "block_sparse_attention",
    "coarse_to_fine_attention",
    "predicted_mask",
    "radial",
    "sliding_tile",
    "token_tiles",
]
