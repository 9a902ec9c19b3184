"""Distances between two sets of points, for the 2-D twin, where no feature network is needed.

Sliced Wasserstein (Bonneel et al. 2015, doi 10.1007/s10851-014-0506-3): project both sets onto random directions;
on a line the best transport pairs sorted values, so with n points each

    W^2 = mean over directions of  mean_i ( sort(a . d)_i - sort(b . d)_i )^2,      W in units of space.

A shift by m gives |m| / sqrt(dim) exactly. Maximum mean discrepancy (Gretton et al. 2012, JMLR 13, eq. 3) with the
Gaussian kernel k(x, y) = exp(-|x - y|^2 / 2 s^2): the unbiased

    MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{ij} k(a_i, b_j),

given as the square, since an unbiased square may come out below 0. The first sees how far mass has to travel, the
second whether the shapes agree at the kernel's scale; between two samples of one law neither is 0, so compare with
what two fresh samples of the truth give.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def sliced_wasserstein(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], num_projections: int = 128, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance of two sets of equally many points, over random directions of this seed.

    In the plane the directions are evenly spaced and the seed does nothing. Raises ValueError for sets of other sizes.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) == 0:
        raise ValueError(f"both sets need the same number of points, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.shape[1] == 2:
        angle = torch.arange(num_projections, dtype=torch.float64, device=a.device) * torch.pi / num_projections
        directions = torch.stack([angle.cos(), angle.sin()], dim=1)
    else:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(num_projections, a.shape[1], generator=generator, dtype=torch.float64).to(a.device)
        directions = directions / directions.norm(dim=1, keepdim=True)
    first, second = ((points.double() @ directions.T).sort(dim=0).values for points in (a, b))
    return (first - second).square().mean().sqrt().item()


def mmd(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], scale: float = 1.0) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel of width `scale`; at most 4 000 points a side.

    Raises ValueError for fewer than 2 points, more than 4 000, or a scale that is not positive.
    """
    if not (2 <= len(a) <= 4000 and 2 <= len(b) <= 4000):
        raise ValueError(f"give 2 … 4000 points on each side (the cost is quadratic), got {len(a)} and {len(b)}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * scale**2))

    def among(x: Tensor) -> Tensor:
        return (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))

    return (among(a) + among(b) - 2 * kernel(a, b).mean()).item()
