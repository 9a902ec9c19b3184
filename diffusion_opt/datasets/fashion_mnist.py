"""Fashion-MNIST: 60,000 + 10,000 gray pictures of clothes, 28x28, ten classes (Xiao et al. 2017, arXiv 1708.07747).

Small, real and MIT-licensed, so it lies in the repository as its four original IDX files: a big-endian header (two zero
bytes, a type byte, the number of dimensions, then each dimension as a 32-bit integer) and the raw bytes. The loader
checks each file's SHA-256 first. The small size pools 28 -> 14 and pads to 16 with background, as in the micro model.
"""

import gzip
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.datasets.integrity import CorruptFileError, verify
from diffusion_opt.datasets.labeled import DataSet, ImageData
from diffusion_opt.names import data_dir

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes.

    Raises CorruptFileError if it is no gzip file, has another type, or holds more or fewer bytes than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptFileError(f"{path} is truncated or not a gzip file ({error}); restore it with git") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise CorruptFileError(f"{path} is not an IDX file of bytes: it starts with {raw[:4].hex()}, not 000008")
    num_dims = raw[3]
    if len(raw) < 4 + 4 * num_dims:
        raise CorruptFileError(f"{path} announces {num_dims} dimensions but ends within its header ({len(raw)} bytes)")
    shape = struct.unpack_from(f">{num_dims}I", raw, 4)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims)
    if data.size != np.prod(shape):
        raise CorruptFileError(f"{path} announces shape {shape} but holds {data.size:,} bytes")
    return data.reshape(shape)


@cache
def _raw(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    verify(folder)
    stem = _FILES[split]
    images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz").copy()
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels)


def load_fashion_mnist(split: Literal["train", "test"], size: Literal[28, 16] = 28) -> ImageData:
    """Load one split from `data/fashion-mnist`: images (N, 1, size, size) float32 in [-1, 1].

    Raises ValueError for an unknown split or size, CorruptFileError for a missing, truncated or altered file.
    """
    if split not in _FILES:
        raise ValueError(f"split must be one of {sorted(_FILES)}, got {split!r}")
    if size not in (28, 16):
        raise ValueError(f"size must be 28 (original) or 16 (pooled and padded), got {size}")
    raw, labels = _raw(data_dir() / "fashion-mnist", split)
    images = raw.float() / 127.5 - 1
    if size == 16:
        images = F.pad(F.avg_pool2d(images, 2), (1, 1, 1, 1), value=-1.0)
    return ImageData(images, labels.clone(), FASHION_CLASSES)


FASHION_MNIST = DataSet(
    "Fashion-MNIST",
    FASHION_CLASSES,
    ((1, 28, 28), (1, 16, 16)),
    lambda shape: load_fashion_mnist("train", shape[-1]),
)
