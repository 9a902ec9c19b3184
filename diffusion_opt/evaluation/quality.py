"""How good generated images are: one frozen record with everything that is needed to read its numbers.

    distance          FD (fashion features) to the real images' statistics, with a bootstrap interval; lower is better
    floor             the same distance for as many real training images: what a perfect model would get
    kernel_distance   KID in the same features: unbiased in n, a second opinion without the Gaussian assumption
    precision         share of generated images that lie among the real ones (fidelity)
    recall            share of real images that the generated ones cover (variety; falls when modes are dropped)
    class_agreement   share of generated images that the classifier gives the asked class
    teacher           against the teacher's own images from the same seeds: what a technique changed, without the
                      teacher's own error (optional)

The distance is biased upward at finite n, so `compare` refuses records of different sample counts, features or
references. Samples are drawn with balanced classes; the stored real examples are balanced too.
"""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.evaluation.distances import (
    bootstrap_counts,
    bootstrap_frechet,
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
)
from diffusion_opt.evaluation.features import (
    FEATURES_BY_SIZE,
    METRIC_NAME,
    FashionFeatures,
    as_saved,
    embed,
    load_features,
)
from diffusion_opt.evaluation.reference import Reference, floor_distance, load_reference

RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class TeacherGap:
    """Distance to the teacher's images from the same noise and labels.

    Both root mean squares are relative: 0 is the same images, 1 is as far as two unrelated images of the teacher.
    """

    distance: float  # Fréchet distance between the two sets, same features
    feature_rms: float
    pixel_rms: float


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one set of generated images; see the module's head for the meaning of each number."""

    distance: float
    distance_low: float
    distance_high: float
    floor: float | None  # None for more samples than there are stored real ones
    kernel_distance: float
    kernel_deviation: float
    precision: float
    recall: float
    class_agreement: float
    num_samples: int
    features: str  # name of the feature network
    reference: str  # split of the real images
    seed: int  # of the bootstrap and the kernel subsets
    resamples: int
    metric: str = METRIC_NAME
    teacher: TeacherGap | None = None

    def to_dict(self) -> dict:
        """Plain numbers and strings for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict) -> "Quality":
        """The inverse of `to_dict`."""
        teacher = stored.get("teacher")
        return cls(**{**stored, "teacher": None if teacher is None else TeacherGap(**teacher)})


def quality(
    images: Float[Tensor, "n 1 s s"],
    labels: Int[Tensor, " n"],
    reference: Reference | None = None,
    *,
    teacher_images: Float[Tensor, "n 1 s s"] | None = None,
    network: FashionFeatures | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Quality:
    """Measure generated images in [-1, 1] against real ones; by default the test images, features by image size.

    Raises ValueError for labels that do not fit the images or the classes, for images of a size without a network, for
    a reference of another network, and for values that are not finite.
    """
    network = network if network is not None else load_features(features_for(images))
    name = network.config.name
    reference = reference if reference is not None else load_reference(name)
    if reference.features != name:
        raise ValueError(f"the reference was made with {reference.features!r}, the feature network is {name!r}")
    _check_labels(labels, len(images), network.config.num_classes)
    features, logits = embed(network, images)
    mean, cov = moments(features)
    distance = frechet_distance(mean, cov, reference.mean, reference.cov).item()
    counts = bootstrap_counts(labels.cpu(), resamples, torch.Generator().manual_seed(seed))
    resampled = bootstrap_frechet(features, counts, reference.mean, reference.cov)
    low, high = bootstrap_interval(distance, resampled)
    real = reference.first(len(images))
    kernel_mean, kernel_deviation = kernel_distance(real, features, seed)
    precision, recall = precision_recall(real, features)
    return Quality(
        distance=distance,
        distance_low=low,
        distance_high=high,
        floor=floor(len(images), reference),
        kernel_distance=kernel_mean,
        kernel_deviation=kernel_deviation,
        precision=precision,
        recall=recall,
        class_agreement=(logits.argmax(1) == labels.cpu()).double().mean().item(),
        num_samples=len(images),
        features=name,
        reference=reference.split,
        seed=seed,
        resamples=resamples,
        teacher=None if teacher_images is None else teacher_gap(images, teacher_images, network),
    )


def features_for(images: Float[Tensor, "n 1 s s"]) -> str:
    """Name of the feature network for these images. Raises ValueError for a shape that none was trained for."""
    size = images.shape[-1]
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[-2] != size or size not in FEATURES_BY_SIZE:
        raise ValueError(
            f"quality needs images of shape (n, 1, s, s) with s in {sorted(FEATURES_BY_SIZE)}, "
            f"got {tuple(images.shape)}; pass network= and reference= for other images"
        )
    return FEATURES_BY_SIZE[size]


def floor(num_samples: int, reference: Reference) -> float | None:
    """Distance of as many real images of the other split to the reference; None if not so many are stored."""
    other = load_reference(reference.features, "train" if reference.split == "test" else "test")
    return floor_distance(reference, other, num_samples) if num_samples <= len(other.examples) else None


def teacher_gap(
    images: Float[Tensor, "n 1 s s"], teacher_images: Float[Tensor, "n 1 s s"], network: FashionFeatures
) -> TeacherGap:
    """Compare images with the teacher's, paired by seed and label. Raises ValueError if the shapes differ."""
    if images.shape != teacher_images.shape:
        raise ValueError(
            f"images and teacher_images are compared pair by pair, "
            f"got shapes {tuple(images.shape)} and {tuple(teacher_images.shape)}"
        )
    (mine, _), (theirs, _) = embed(network, images), embed(network, teacher_images)
    return TeacherGap(
        distance=frechet_distance(*moments(mine), *moments(theirs)).item(),
        feature_rms=_relative_rms(mine, theirs),
        pixel_rms=_relative_rms(as_saved(images).flatten(1).cpu(), as_saved(teacher_images).flatten(1).cpu()),
    )


def _relative_rms(values: Float[Tensor, "n d"], origin: Float[Tensor, "n d"]) -> float:
    """Root mean square difference over that of two independent rows of `origin` (twice its variance)."""
    unrelated = 2 * origin.double().var(0).sum()
    return ((values - origin).double().square().sum(1).mean() / unrelated).sqrt().item()


def compare(quality: Quality, baseline: Quality) -> float:
    """Ratio of the distances. Raises ValueError naming the first thing in which the two protocols differ."""
    for field in ("metric", "num_samples", "features", "reference"):
        mine, theirs = getattr(quality, field), getattr(baseline, field)
        if mine != theirs:
            raise ValueError(
                f"distances compare only under one protocol: {field} is {mine!r} here and {theirs!r} in the baseline; "
                "measure both again with the same"
            )
    return quality.distance / baseline.distance


def _check_labels(labels: Int[Tensor, " n"], num_images: int, num_classes: int) -> None:
    if labels.shape != (num_images,):
        raise ValueError(f"one label an image: got labels of shape {tuple(labels.shape)} for {num_images} images")
    if not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(
            f"asked classes must lie in 0 … {num_classes - 1}, got {int(labels.min())} … {int(labels.max())}"
        )
