"""What generated images are compared with: feature statistics of the real ones, computed once and shipped.

For each feature network two references lie in `data/features/<name>/reference.safetensors`: the 10,000 test images
(the default: a model cannot have memorized them) and the 60,000 training images. Mean and covariance are float64 over
all images of the split; beside them lie the features of 10,000 single images in float16, in an order that repeats the
classes 0, 1, ..., 9, so that the first n are balanced. Nearest-neighbor and kernel distances need those, and so does
the floor:

    floor(n) = the distance of n real training images to the test reference, measured as for generated images.

No model trained on the training images can be expected below it, and being measured at the same n it has the same
finite-sample bias as the number it stands beside.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from diffusion_opt.datasets import ImageData, verify
from diffusion_opt.datasets.writing import write_tensors
from diffusion_opt.evaluation.distances import frechet_distance, moments
from diffusion_opt.evaluation.features import FashionFeatures, embed, feature_folder

SPLITS = ("test", "train")
REFERENCE_FILE = "reference.safetensors"
NUM_STORED = 10_000  # single feature vectors kept of each split


@dataclass(frozen=True, slots=True)
class Reference:
    """Feature statistics of real images: moments over the whole split and single features of a balanced part of it."""

    features: str  # name of the feature network
    split: str  # "test" or "train"
    mean: Float[Tensor, " f"]
    cov: Float[Tensor, "f f"]
    examples: Float[Tensor, "n f"]  # classes repeat 0, 1, ..., 9

    def first(self, num_samples: int) -> Float[Tensor, "n f"]:
        """The first `num_samples` examples, all of them if there are fewer."""
        return self.examples[:num_samples].float()


def load_reference(features: str = "fashion", split: Literal["test", "train"] = "test") -> Reference:
    """Load the shipped reference of a feature network.

    Raises ValueError for an unknown name or split, CorruptFileError for a missing, truncated or altered file.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    folder = feature_folder(features)
    verify(folder)
    stored = load_file(folder / REFERENCE_FILE)
    return Reference(features, split, *(stored[f"{split}.{part}"] for part in ("mean", "cov", "examples")))


def make_reference(network: FashionFeatures, data: ImageData, split: str) -> Reference:
    """Compute a reference from real images. Raises ValueError if a class has too few images for a balanced part."""
    embedded, _ = embed(network, data.images)
    mean, cov = moments(embedded)
    order = _balanced(data.labels, min(NUM_STORED, len(data)), len(data.class_names))
    return Reference(network.config.name, split, mean, cov, embedded[order].half())


def _balanced(labels: Int[Tensor, " n"], count: int, num_classes: int) -> Int[Tensor, " m"]:
    """Indices of `count` samples whose classes repeat 0, 1, ..., in order of appearance."""
    per_class = count // num_classes
    positions = [(labels == label).nonzero()[:, 0][:per_class] for label in range(num_classes)]
    if short := [label for label, found in enumerate(positions) if len(found) < per_class]:
        raise ValueError(f"class {short[0]} has {len(positions[short[0]])} images, a balanced part needs {per_class}")
    return torch.stack(positions, dim=1).flatten()


def save_references(references: list[Reference], folder: Path) -> None:
    """Write the references of one feature network to its folder; the caller seals it with `datasets.write_sums`."""
    tensors = {}
    for reference in references:
        for part in ("mean", "cov", "examples"):
            tensors[f"{reference.split}.{part}"] = getattr(reference, part).contiguous()
    write_tensors(folder / REFERENCE_FILE, tensors)


def floor_distance(reference: Reference, real: Reference, num_samples: int) -> float:
    """Fréchet distance of `num_samples` real images of another split to the reference, the mean over disjoint parts.

    Raises ValueError if the splits are the same, the feature networks differ, or too few examples are stored.
    """
    if reference.features != real.features:
        raise ValueError(f"references use different feature networks: {reference.features!r} and {real.features!r}")
    if reference.split == real.split:
        raise ValueError(f"the floor compares two splits, got {real.split!r} for both")
    if not 2 <= num_samples <= len(real.examples):
        raise ValueError(f"num_samples must lie in 2 … {len(real.examples)} (stored examples), got {num_samples}")
    parts = [part for part in real.examples.split(num_samples) if len(part) == num_samples]
    distances = [frechet_distance(*moments(part), reference.mean, reference.cov) for part in parts]
    return torch.stack(distances).mean().item()
