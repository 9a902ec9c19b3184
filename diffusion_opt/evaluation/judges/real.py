"""Real pictures to compare with: a tensor, a folder of files, or those of a shipped data set by name.

    RealPictures.of(tensor)              half are the reference, half are held out
    RealPictures.of("photos/", size=64)  the files of a folder, in order of their names
    RealPictures.of("fashion")           the 10,000 test images; held out are training images, classes balanced

Held-out pictures tell what a perfect model would get: as many of them as there are generated ones, measured in the same
way. A distance without this floor says little, because its finite-sample bias can be larger than the distance itself.

Features of real pictures do not change, so they can be kept in a file (`cache`). The file holds a fingerprint of the
network, the preprocessing and every pixel, and is refused for others.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Union

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.datasets import data_dir, load_fashion_mnist
from diffusion_opt.evaluation.features import as_saved

SHIPPED_REAL = {"fashion": 28, "fashion-micro": 16}  # name -> size in pixels
FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
NUM_HELD_OUT = 10_000


@dataclass(frozen=True, eq=False)
class RealPictures:
    """Real pictures (n, channels, height, width) in [-1, 1] and others of the same kind that are held out."""

    name: str
    pictures: Float[Tensor, "n c h w"]
    held_out: Float[Tensor, "m c h w"]
    cache: Path | None = None  # file that keeps features, see `imagenet.py`

    def __post_init__(self) -> None:
        if min(len(self.pictures), len(self.held_out)) < 2:
            raise ValueError(
                f"real pictures {self.name!r}: need at least 2 to compare with and 2 held out, "
                f"got {len(self.pictures)} and {len(self.held_out)}"
            )

    @classmethod
    def of(
        cls,
        source: Union[Tensor, str, Path, "RealPictures"],
        *,
        size: int | tuple[int, int] | None = None,
        cache: Path | None = None,
    ) -> "RealPictures":
        """Real pictures from a tensor of pictures or clips, a folder, or the name of a shipped data set.

        `size` (pixels, or height and width) is what files are resized to; without it they must agree. Every second
        picture is held out. Raises ValueError for an empty folder, for files of several sizes and for other shapes.
        """
        if isinstance(source, RealPictures):
            return source
        if isinstance(source, Tensor):
            return cls._halved("tensor", source.flatten(0, 1) if source.ndim == 5 else source, cache)
        if str(source) in SHIPPED_REAL:
            return shipped(str(source))
        return cls._halved(Path(source).name, read_folder(Path(source), size), cache)

    @classmethod
    def _halved(cls, name: str, pictures: Tensor, cache: Path | None) -> "RealPictures":
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise ValueError(f"real pictures are (n, 1 or 3 channels, height, width), got {tuple(pictures.shape)}")
        return cls(name, pictures[::2], pictures[1::2], cache)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of every pixel as a file would hold it."""
        digest = hashlib.sha256()
        for part in (self.pictures, self.held_out):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(((as_saved(part) + 1) * 127.5).round().byte().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def shipped(name: str) -> RealPictures:
    """Fashion-MNIST: all test images; held out are training images whose classes repeat 0, 1, …, 9."""
    size = SHIPPED_REAL[name]
    test, train = load_fashion_mnist("test", size), load_fashion_mnist("train", size)
    num_classes = len(train.class_names)
    of_class = [(train.labels == label).nonzero()[: NUM_HELD_OUT // num_classes, 0] for label in range(num_classes)]
    order = [(test.labels == label).nonzero()[:, 0] for label in range(num_classes)]
    pictures = test.images[torch.stack(order, 1).flatten()]
    held_out = train.images[torch.stack(of_class, 1).flatten()]
    return RealPictures(name, pictures, held_out, data_dir() / "features" / "imagenet" / f"{name}.safetensors")


def read_folder(folder: Path, size: int | tuple[int, int] | None = None) -> Float[Tensor, "n c h w"]:
    """The pictures of a folder in order of their names; gray if all are gray, else three channels.

    Raises ValueError for a folder without pictures and for pictures of several sizes where no size is asked for.
    """
    import numpy as np
    from PIL import Image

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FILES) if folder.is_dir() else []
    if not paths:
        raise ValueError(
            f"{folder} is no folder with pictures ({', '.join(sorted(FILES))}), and no shipped data set "
            f"({', '.join(SHIPPED_REAL)})"
        )
    opened = [Image.open(path) for path in paths]
    mode = "L" if all(image.mode in ("L", "1") for image in opened) else "RGB"
    opened = [image.convert(mode) for image in opened]
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        opened = [image.resize((width, height), Image.Resampling.LANCZOS) for image in opened]
    for path, image in zip(paths, opened, strict=True):
        if image.size != opened[0].size:
            raise ValueError(f"{path} is {image.size}, {paths[0]} is {opened[0].size}: pass size= to resize all")
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in opened]))
    return (stacked[:, None] if mode == "L" else stacked.permute(0, 3, 1, 2)).float() / 127.5 - 1
