"""The independent judge: distances in the features of a network that was trained on photographs, and not by us.

    imagenet.distance         FD: Fréchet distance to real pictures, with a bootstrap interval and what as many real
                              pictures get; lower is better
    imagenet.kernel_distance  KID, with two deviations over subsets around it; unbiased in the sample count
    imagenet.precision        share of pictures that lie among the real ones (fidelity)
    imagenet.recall           share of real pictures that these cover (variety)

No student of this package was trained on this network and no setting was chosen for it alone, so it can contradict the
judge that knows the data. It sees what that one is blind to, texture and grain: its first layers are edge and texture
filters, and photographs without grain are what it learned from. It does not know the prompts. A clip is judged frame by
frame, so motion is not seen. See `efficientnet.py` for the network and what it is shown.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from diffusion_opt.datasets.writing import write_tensors
from diffusion_opt.evaluation.distances import (
    bootstrap_counts,
    bootstrap_frechet,
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
)
from diffusion_opt.evaluation.judges.efficientnet import (
    NUM_FEATURES,
    EfficientNetLite0,
    imagenet_features,
    imagenet_fingerprint,
    load_imagenet,
)
from diffusion_opt.evaluation.judges.judge import RESAMPLES, Number, Prompts, as_frames, strata
from diffusion_opt.evaluation.judges.real import RealPictures

FLOOR_PARTS = 8  # disjoint sets of held-out pictures that the floor is the mean of, at most
NUM_STORED = 2000  # single features kept of the reference and of the held-out pictures


@dataclass(frozen=True, slots=True)
class FeatureReference:
    """Features of real pictures: moments over all of the reference, single ones of it and of those held out."""

    name: str
    fingerprint: str  # of network, preprocessing and pixels
    mean: Float[Tensor, " f"]
    cov: Float[Tensor, "f f"]
    examples: Float[Tensor, "n f"]
    held_out: Float[Tensor, "m f"]

    @property
    def basis(self) -> str:
        return f"EfficientNet-Lite0 against {self.name} {self.fingerprint[:12]}"

    def floor(self, num: int) -> float | None:
        """Mean distance of `num` held-out pictures, over disjoint parts; None if fewer are held out."""
        parts = [part for part in self.held_out.split(num)[:FLOOR_PARTS] if len(part) == num]
        if num < 2 or not parts:
            return None
        distances = [frechet_distance(*moments(part), self.mean, self.cov) for part in parts]
        return torch.stack(distances).mean().item()


def reference_fingerprint(real: RealPictures) -> str:
    """What the features of these real pictures depend on."""
    return hashlib.sha256(f"{imagenet_fingerprint()}; {real.fingerprint}".encode()).hexdigest()


def compute_reference(real: RealPictures, network: EfficientNetLite0 | None = None) -> FeatureReference:
    """Features of real pictures, about 3 ms each on a CPU core for 28x28 pixels."""
    reference = imagenet_features(real.pictures, network)
    held_out = imagenet_features(real.held_out[:NUM_STORED], network)
    mean, cov = moments(reference)
    return FeatureReference(real.name, reference_fingerprint(real), mean, cov, reference[:NUM_STORED], held_out)


def save_reference(reference: FeatureReference, path: Path) -> None:
    """Keep features in a safetensors file: half of the symmetric covariance in float32, single features in float16."""
    rows, columns = torch.triu_indices(NUM_FEATURES, NUM_FEATURES)
    tensors = {
        "mean": reference.mean.float(),
        "cov": reference.cov[rows, columns].float(),
        "examples": reference.examples.half(),
        "held_out": reference.held_out.half(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"name": reference.name, "fingerprint": reference.fingerprint}
    write_tensors(path, tensors, about)


def read_reference(path: Path) -> FeatureReference:
    """The inverse of `save_reference`, up to its rounding."""
    with safe_open(path, "pt") as file:
        about, stored = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    rows, columns = torch.triu_indices(NUM_FEATURES, NUM_FEATURES)
    cov = torch.empty(NUM_FEATURES, NUM_FEATURES, dtype=torch.float64)
    cov[rows, columns] = stored["cov"].double()
    cov[columns, rows] = stored["cov"].double()
    singles = (stored[part].float() for part in ("examples", "held_out"))
    return FeatureReference(about["name"], about["fingerprint"], stored["mean"].double(), cov, *singles)


def reference_of(real: RealPictures, network: EfficientNetLite0 | None = None) -> FeatureReference:
    """Features of real pictures, from their cache if they have one; a cache that does not exist yet is written.

    Raises ValueError for a cache of other pictures, another network or another preprocessing.
    """
    if real.cache is None or not real.cache.is_file():
        reference = compute_reference(real, network)
        if real.cache is not None:
            save_reference(reference, real.cache)
        return reference
    stored, expected = read_reference(real.cache), reference_fingerprint(real)
    if stored.fingerprint != expected:
        raise ValueError(
            f"{real.cache} holds features of other pictures or of another network ({stored.fingerprint[:12]}, expected "
            f"{expected[:12]}): delete it, or name another file"
        )
    return stored


@dataclass(frozen=True, slots=True)
class ImageNetJudge:
    """See the module's head; `network` is the shipped one unless another device or copy is wanted."""

    network: EfficientNetLite0 | None = None
    resamples: int = RESAMPLES
    seed: int = 0  # of the bootstrap and the kernel subsets

    name: ClassVar[str] = "imagenet"
    needs: ClassVar[frozenset[str]] = frozenset({"real"})

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raises ValueError without real pictures, and for other shapes than pictures and clips."""
        if real is None:
            raise ValueError(
                "the ImageNet judge compares with real pictures: pass real=, a tensor, a folder or a shipped name; "
                "without any, the judge 'paired' compares with the teacher's own pictures"
            )
        as_frames(pictures)

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError without real pictures, and for fewer than 4 pictures."""
        self.check(pictures, prompts, real)
        frames, groups = as_frames(pictures), strata(prompts, pictures)
        reference = reference_of(real, self.network)
        features = imagenet_features(frames, self.network or load_imagenet())
        distance = frechet_distance(*moments(features), reference.mean, reference.cov).item()
        counts = bootstrap_counts(groups, self.resamples, torch.Generator().manual_seed(self.seed))
        low, high = bootstrap_interval(distance, bootstrap_frechet(features, counts, reference.mean, reference.cov))
        among = reference.examples[: len(features)]
        kernel, deviation = kernel_distance(among, features, self.seed)
        precision, recall = precision_recall(among, features)
        num, basis = len(features), reference.basis

        def number(value: float, *interval: float, real: float | None = None) -> Number:
            return Number(value, num, basis, *interval, real=real)

        return {
            "imagenet.distance": number(distance, low, high, real=reference.floor(num)),
            "imagenet.kernel_distance": number(kernel, kernel - 2 * deviation, kernel + 2 * deviation),
            "imagenet.precision": number(precision),
            "imagenet.recall": number(recall),
        }
