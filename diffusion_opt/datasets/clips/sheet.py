"""The pictures and scenes that clips are made of, as they lie in `data/clips`, checked before use.

`pictures.png` holds ten named emoji, 64x64 texels each, four for a pixel of a frame; `scenes.png` twelve named still
scenes of 64x64 pixels with landmarks. `tools/draw_clips.py` drew both once. A frame needs a picture at any place, also
between pixels. What a pixel then shows is the mean of the 4x4 texels that it covers, so the texture is averaged over
4x4 once, here, and read by linear interpolation: sharpness then hardly depends on where between two pixels it stands.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.datasets.integrity import CorruptFileError, verify
from diffusion_opt.names import data_dir

FOLDER = "clips"  # below the data folder; the name stands nowhere else
PICTURES = (
    "soccer-ball",
    "basketball",
    "red-heart",
    "frog",
    "tropical-fish",
    "ghost",
    "pizza",
    "panda",
    "glowing-star",
    "strawberry",
)
SCENES = (
    "beach",
    "meadow",
    "forest",
    "desert",
    "snow",
    "ocean",
    "night",
    "city",
    "space",
    "volcano",
    "farm",
    "candy",
)
SIZE, PICTURE, TEXELS = 64, 16, 4  # pixels of a frame and of a picture; texels per pixel, in each direction
MARGIN = 2 * TEXELS  # empty texels around a picture's texture


@dataclass(frozen=True, eq=False)
class Sheet:
    """`scenes` (12, 3, 64, 64) in [-1, 1]; `textures` (10, 4, 80, 80): averaged color in [-1, 1] times alpha, alpha."""

    scenes: Float[Tensor, "s 3 size size"]
    textures: Float[Tensor, "p 4 texels texels"]


def sheet() -> Sheet:
    """The shipped sheet. Raises CorruptFileError for a missing or altered file, or one of another size."""
    return _read(data_dir() / FOLDER)


@cache
def _read(folder: Path) -> Sheet:
    verify(folder)
    scenes = _cut(folder / "scenes.png", "RGB", SIZE, len(SCENES))
    pictures = _cut(folder / "pictures.png", "RGBA", PICTURE * TEXELS, len(PICTURES))
    color, alpha = 2 * pictures[:, :3] - 1, pictures[:, 3:]
    padded = F.pad(torch.cat([color * alpha, alpha], 1), (MARGIN,) * 4)
    # 4x4 texels have their middle between texels: pad so that texel i holds the mean of i - 2 … i + 1.
    averaged = F.avg_pool2d(F.pad(padded, (TEXELS // 2, TEXELS // 2 - 1) * 2), TEXELS, stride=1)
    return Sheet(2 * scenes - 1, averaged)


def _cut(path: Path, mode: str, side: int, number: int) -> Float[Tensor, "n c side side"]:
    """The tiles of a strip, values in [0, 1]."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert(mode))
    if pixels.shape[:2] != (side, side * number):
        raise CorruptFileError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, expected {side * number}x{side}")
    tiles = torch.from_numpy(pixels.copy()).float() / 255
    return tiles.unflatten(1, (number, side)).permute(1, 3, 0, 2).contiguous()
