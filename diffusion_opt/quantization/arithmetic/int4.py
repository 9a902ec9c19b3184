"""INT4 in blocks: sixteen numbers for a weight are too few for a whole channel, but not for 64 neighbors.

    q = clip(round(x s), -8, 7),     s = 7 / max|64 neighbors|,     x ~ q / s

The rounding is that of INT8 with four bits (`int8.py`); what changes is who shares a scale. With a float32 scale for
each 64 numbers a weight costs 4 + 32 / 64 = 4.5 bits, as much as NVFP4, whose blocks are smaller and whose scales are
coarser. Integers are evenly spaced, so small numbers of a block are lost where an outlier makes the step large: for
them NVFP4 has its finer steps near zero.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.quantization.arithmetic.finite import finite
from diffusion_opt.quantization.arithmetic.int8 import integers


def int4_blocks(blocks: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """Each row of k numbers in INT4 under a scale of its own."""
    q, factor = integers(blocks, blocks.abs().amax(-1, keepdim=True), bits=4)
    return q / factor


def int4(x: Float[Tensor, "*s n"], block: int = 64) -> Float[Tensor, "*s n"]:
    """x in INT4 with a scale for each `block` neighbors along the last axis; zeros are thought to follow a short row.

    Raises ValueError for numbers that are inf or NaN.
    """
    finite(x)
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return int4_blocks(blocks).flatten(-2)[..., : x.shape[-1]]
