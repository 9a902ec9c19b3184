"""Distances between two sets of features: Fréchet with a bootstrap interval, kernel, and nearest-neighbor coverage.

The Fréchet distance of two Gaussians with means m and covariances C (Heusel et al. 2017, arXiv 1706.08500, eq. 6) is

    d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)),      tr (C1 C2)^(1/2) = sum sqrt(eig(C1^(1/2) C2 C1^(1/2))).

The right-hand form needs only symmetric eigenvalues, which torch solves in batches; that is why it is our own function
(the bootstrap calls it hundreds of times) and not torchmetrics', with which a test compares it digit by digit.

The distance is biased upward at a finite number of samples n, by about a constant over n: numbers at different n must
not be compared, and `quality` refuses to. A bootstrap resample repeats samples and so carries that bias a second time.
We therefore take the spread of the resampled distances around their own mean and put it around the estimate; the
interval then speaks of what another n samples of the same model would have given. Resamples are drawn within the
asked classes: how many samples a class gets is set by us and not by chance, and would otherwise dominate the spread.

Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1-2): a sample is covered by a set if it falls
into the ball of some member, whose radius is the distance to its k-th neighbor in its own set. Precision is the share
of generated samples that the real ones cover (fidelity), recall the reverse (variety: it falls when a mode is dropped).
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

NEIGHBORS = 3  # k of Kynkäänniemi et al.
PRODUCTS = 2**24  # products of feature pairs held at once: 128 MiB
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 10, 1000


def moments(features: Float[Tensor, "n f"]) -> tuple[Float[Tensor, " f"], Float[Tensor, "f f"]]:
    """Mean and unbiased covariance in float64. Raises ValueError for fewer than two samples."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    return features.double().mean(0), features.double().T.cov()


def frechet_distance(
    mean1: Float[Tensor, "*b f"],
    cov1: Float[Tensor, "*b f f"],
    mean2: Float[Tensor, " f"],
    cov2: Float[Tensor, "f f"],
) -> Float[Tensor, "*b"]:
    """Fréchet distance of Gaussians in float64, batched over the first pair; never below 0."""
    mean1, cov1, mean2, cov2 = mean1.double(), cov1.double(), mean2.double(), cov2.double()
    values, vectors = torch.linalg.eigh(cov2)
    root2 = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root2 @ cov1 @ root2).clamp(min=0).sqrt().sum(-1)
    traces = cov1.diagonal(dim1=-2, dim2=-1).sum(-1) + cov2.trace()
    return ((mean1 - mean2).square().sum(-1) + traces - 2 * cross).clamp(min=0)


def bootstrap_counts(strata: Int[Tensor, " n"], resamples: int, generator: torch.Generator) -> Float[Tensor, "r n"]:
    """How often each resample draws each sample: with replacement, within each stratum as many as it has."""
    counts = torch.zeros(resamples, len(strata), dtype=torch.float64)
    for stratum in strata.unique():
        members = (strata == stratum).nonzero()[:, 0]
        draws = members[torch.randint(len(members), (resamples, len(members)), generator=generator)]
        counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    return counts


def bootstrap_frechet(
    features: Float[Tensor, "n f"],
    counts: Float[Tensor, "r n"],
    mean: Float[Tensor, " f"],
    cov: Float[Tensor, "f f"],
) -> Float[Tensor, " r"]:
    """Fréchet distance of each resample of the features (a row of `counts`) to the fixed Gaussian (mean, cov).

    All resamples at once: one matrix product of the counts with the products of feature pairs gives all second moments.
    """
    (num_resamples, n), num_features = counts.shape, features.shape[1]
    center = features.double().mean(0)
    centered = features.double() - center
    rows, columns = torch.triu_indices(num_features, num_features)
    second = torch.zeros(num_resamples, len(rows), dtype=torch.float64)
    size = max(1, PRODUCTS // len(rows))
    for part, weight in zip(centered.split(size), counts.split(size, dim=1), strict=True):
        second += weight @ (part[:, rows] * part[:, columns])
    shift = counts @ centered / n
    upper = (second / n - shift[:, rows] * shift[:, columns]) * n / (n - 1)
    covs = torch.empty(num_resamples, num_features, num_features, dtype=torch.float64)
    covs[:, rows, columns] = upper
    covs[:, columns, rows] = upper
    return frechet_distance(center + shift, covs, mean, cov)


def bootstrap_interval(
    estimate: float, resampled: Float[Tensor, " r"], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval around the estimate from the spread of resampled values around their own mean; never below 0."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), for example 0.95, got {confidence}")
    tail = (1 - confidence) / 2
    spread = torch.quantile(resampled - resampled.mean(), torch.tensor([tail, 1 - tail], dtype=resampled.dtype))
    return max(0.0, estimate + float(spread[0])), estimate + float(spread[1])


class _Given(nn.Module):
    """Stands for the feature network in torchmetrics where the features are already computed."""

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(real: Float[Tensor, "n f"], generated: Float[Tensor, "m f"], seed: int) -> tuple[float, float]:
    """Kernel distance (KID; Bińkowski et al. 2018, arXiv 1801.01401) by torchmetrics: mean and deviation over subsets.

    Unbiased at any sample count, so it may come out slightly negative. A subset has at most half of the samples, so
    that subsets differ. torchmetrics draws them from torch's global generator; it is seeded here, then left as it was.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = max(2, min(KERNEL_SUBSET_SIZE, len(real) // 2, len(generated) // 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        metric = KernelInceptionDistance(feature=_Given(), subsets=KERNEL_SUBSETS, subset_size=size)
    metric.update(real.float(), real=True)
    metric.update(generated.float(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(
    real: Float[Tensor, "n f"], generated: Float[Tensor, "m f"], neighbors: int = NEIGHBORS
) -> tuple[float, float]:
    """k-nearest-neighbor precision and recall of the generated set. Raises ValueError for fewer than k + 1 samples."""
    if min(len(real), len(generated)) <= neighbors:
        raise ValueError(
            f"{neighbors} neighbors need at least {neighbors + 1} samples on each side, "
            f"got {len(real)} real and {len(generated)} generated"
        )
    return _covered(generated, real, neighbors), _covered(real, generated, neighbors)


def _covered(points: Float[Tensor, "n f"], by: Float[Tensor, "m f"], neighbors: int) -> float:
    """Share of `points` inside at least one ball of the set `by`."""
    points, by = points.double(), by.double()
    # The nearest member of a set to one of its own members is that member itself: k + 1 smallest, the last is the k-th.
    nearest = [torch.cdist(part, by).topk(neighbors + 1, largest=False).values for part in by.split(2000)]
    radii = torch.cat(nearest)[:, -1]
    inside = torch.cat([(torch.cdist(part, by) <= radii).any(1) for part in points.split(2000)])
    return inside.double().mean().item()
