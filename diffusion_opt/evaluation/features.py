"""The feature network in which we measure image quality, and how it is loaded.

The Fréchet inception distance (FID; Heusel et al. 2017, arXiv 1706.08500) compares two sets of images by the means and
covariances of a network's features. Its Inception network was trained on color photographs of 299x299 pixels and costs
a large part of a second an image on a CPU; for gray pictures of clothes it is neither fast nor meaningful. Our default
is a small classifier of these very pictures: well under a millisecond an image, 64 features, a few thousand samples
give a full-rank covariance. Its distance is therefore called "FD (fashion features)" everywhere and is comparable with
nobody's FID.

Two choices keep the metric honest. The features are taken before the last nonlinearity, so that they are closer to the
Gaussian that the Fréchet distance assumes. Training augments with small shifts and faint noise but does not mirror: all
shoes of Fashion-MNIST point left, and a metric that mirrored them away could not see a model that gets it wrong.

One architecture serves 28x28 and 16x16 pixels (adaptive pooling to 2x2 in front of the features); each size has its own
weights, made by `benchmarks/train_features.py` and shipped in `data/features/<name>/` with SHA-256 sums.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_opt.datasets import CorruptFileError, data_dir, verify
from diffusion_opt.datasets.writing import write_json, write_tensors

METRIC_NAME = "FD (fashion features)"
FEATURES_BY_SIZE = {28: "fashion", 16: "fashion-micro"}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class FeatureConfig:
    """Architecture of a feature network; stored as `config.json` beside its weights."""

    name: str
    image_size: int  # pixels, square
    widths: tuple[int, int, int, int, int] = (32, 32, 64, 64, 128)  # channels of the five convolutions
    num_features: int = 64
    num_classes: int = 10


class FashionFeatures(nn.Module):
    """Five convolutions, 2x2 pooling, a linear layer to the features and one to the class logits.

    Calling it gives the features, so it can be handed to torchmetrics as `feature=`; `classify` goes on to the logits.
    """

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.num_features
        kernels, strides = (5, 3, 3, 3, 3), (2, 1, 2, 1, 1)
        channels = (1, *config.widths)
        self.blocks = nn.Sequential(
            *(
                _convolution(channels[i], channels[i + 1], kernel, stride)
                for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.to_features = nn.Linear(4 * config.widths[-1], config.num_features)
        self.to_logits = nn.Linear(config.num_features, config.num_classes)

    def forward(self, images: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b f"]:
        """Features of gray images in [-1, 1].

        Raises ValueError if the images have another shape than the network was trained for.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (1, size, size):
            raise ValueError(
                f"feature network {self.config.name!r} takes images of shape (b, 1, {size}, {size}), "
                f"got {tuple(images.shape)}; load the network for your size: {FEATURES_BY_SIZE}"
            )
        return self.to_features(self.pool(self.blocks(images)).flatten(1))

    def classify(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Class logits from the features."""
        return self.to_logits(torch.relu(features))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def as_saved(images: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Images as a file would hold them: clamped to [-1, 1] and rounded to 256 levels.

    Both sides of every comparison pass here, so a distance never rests on what no viewer of the picture could see.
    """
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.inference_mode()
def embed(
    network: FashionFeatures, images: Float[Tensor, "n 1 s s"], batch_size: int = 500
) -> tuple[Float[Tensor, "n f"], Float[Tensor, "n k"]]:
    """Features and class logits of any number of images, on the CPU in float32.

    Raises ValueError for no images, for the wrong shape and for values that are not finite.
    """
    if len(images) == 0:
        raise ValueError("cannot embed 0 images; generate at least two to compare distributions")
    if not images.isfinite().all():
        bad = int((~images.flatten(1).isfinite().all(1)).sum())
        raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity; the sampler diverged")
    parameter = next(network.parameters())
    features, logits = [], []
    for batch in images.split(batch_size):
        inner = network(as_saved(batch.to(parameter)))
        features.append(inner.float().cpu())
        logits.append(network.classify(inner).float().cpu())
    return torch.cat(features), torch.cat(logits)


def feature_folder(name: str) -> Path:
    """Folder of a shipped feature network. Raises ValueError for an unknown name, listing those there are."""
    if name not in FEATURES_BY_SIZE.values():
        raise ValueError(f"feature network must be one of {sorted(FEATURES_BY_SIZE.values())}, got {name!r}")
    return data_dir() / "features" / name


def load_features(name: str = "fashion", device: str | torch.device = "cpu") -> FashionFeatures:
    """Load a shipped feature network: evaluation mode, no gradients, checksums verified.

    Raises ValueError for an unknown name, CorruptFileError for a missing, truncated or altered file.
    """
    return read_features(feature_folder(name)).to(device)


def read_features(folder: Path) -> FashionFeatures:
    """Read a feature network from any folder that `save_features` wrote and `write_sums` sealed."""
    verify(folder)
    stored = json.loads((folder / CONFIG_FILE).read_text())
    network = FashionFeatures(FeatureConfig(**{**stored, "widths": tuple(stored["widths"])}))
    weights = load_file(folder / WEIGHTS_FILE)
    if wrong := set(weights) ^ set(network.state_dict()):
        raise CorruptFileError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {sorted(wrong)[0]!r}")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def save_features(network: FashionFeatures, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; the caller seals the folder with `datasets.write_sums`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, asdict(network.config))
    write_tensors(folder / WEIGHTS_FILE, network.state_dict())
