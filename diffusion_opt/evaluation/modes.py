"""How many modes a set of points has found: the plainest measure of what distribution matching can lose.

A mode of a mixture of Gaussians is covered if enough of the points lie near it: at least `share` of what it would get
were the points drawn from the mixture. Near is within `radius` standard deviations; in the plane, for which this is
meant, three hold 98.9 % of a round mode. Frechet distances see a missing mode only through the mean and the covariance,
and a ring that lost every second mode keeps both.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_opt.flow import GaussianMixtureVelocity


def mode_shares(
    points: Float[Tensor, "n *s"], mixture: GaussianMixtureVelocity, radius: float = 3.0
) -> Float[Tensor, " k"]:
    """Share of the points near each mode (float64). Raises ValueError for no points."""
    return _near(points, mixture, radius).double().mean(0)


def modes_covered(
    points: Float[Tensor, "n *s"], mixture: GaussianMixtureVelocity, radius: float = 3.0, share: float = 0.25
) -> int:
    """Number of modes that hold at least `share` of their weight in the mixture. Raises ValueError for no points."""
    return int((mode_shares(points, mixture, radius) >= share * mixture.weights.to(points.device)).sum())


def stray_share(points: Float[Tensor, "n *s"], mixture: GaussianMixtureVelocity, radius: float = 3.0) -> float:
    """Share of the points that lie near no mode. Raises ValueError for no points."""
    return 1 - _near(points, mixture, radius).any(1).double().mean().item()


def _near(points: Tensor, mixture: GaussianMixtureVelocity, radius: float) -> Bool[Tensor, "n k"]:
    if not len(points):
        raise ValueError("modes are counted in points, got none")
    means, stds = (part.to(points.device) for part in (mixture.means, mixture.stds))
    return ((points.double()[:, None] - means) / stds).flatten(2).norm(dim=2) < radius
