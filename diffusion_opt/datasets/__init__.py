"""What we learn from: loaders that verify what they read."""

from diffusion_opt.datasets.fashion_mnist import FASHION_CLASSES, ImageData, load_fashion_mnist, read_idx
from diffusion_opt.datasets.integrity import CorruptFileError, verify, write_sums
from diffusion_opt.datasets.location import data_dir

__all__ = [
    "FASHION_CLASSES",
    "CorruptFileError",
    "ImageData",
    "data_dir",
    "load_fashion_mnist",
    "read_idx",
    "verify",
    "write_sums",
]
