"""The split of SVDQuant: what four bits cannot hold goes through a thin branch in 16 bits.

    W = U S V^T,      W x  =  (W - B A) x + B (A x),      B = U_r S_r (o, r),   A = V_r^T (r, i)

B A is the matrix of rank r nearest to W (Eckart and Young 1936), so the residual W - B A has the smallest norm that a
branch of that width can leave: its largest singular value is the (r + 1)-th of W. Rounding errors of a block scale with
the block's largest number, so where a few directions carry the outliers, the residual rounds better (Li et al. 2024,
arXiv 2411.05007). Where singular values fall slowly, as in a random matrix, a small rank gains little.

The decomposition runs in double precision, as modelopt's does. `simulate.py` then rounds B and A to bfloat16 and takes
the residual of what is stored.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.quantization.arithmetic.finite import finite


def svd_split(
    weight: Float[Tensor, "o i"], rank: int
) -> tuple[Float[Tensor, "o i"], Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """Residual, B and A with weight = residual + B A. Raises ValueError for a rank the matrix does not have."""
    finite(weight)
    if not 0 < rank <= min(weight.shape):
        raise ValueError(f"rank must be 1 … {min(weight.shape)} for a matrix of {tuple(weight.shape)}, got {rank}")
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    b, a = (u[:, :rank] * s[:rank]).to(weight.dtype), vt[:rank].to(weight.dtype)
    return weight - b @ a, b, a
