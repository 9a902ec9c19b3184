"""What we learn from: loaders that verify what they read; files written in full or not at all."""

from diffusion_opt.datasets.captioned import CaptionedDataSet, CaptionedPictures
from diffusion_opt.datasets.fashion_mnist import FASHION_CLASSES, FASHION_MNIST, load_fashion_mnist, read_idx
from diffusion_opt.datasets.folder_lock import FolderInUseError, folder_lock
from diffusion_opt.datasets.integrity import verify, write_sums
from diffusion_opt.datasets.labeled import DataSet, ImageData, data_for
from diffusion_opt.datasets.portraits.captioned import PORTRAITS
from diffusion_opt.datasets.writing import CorruptFileError, read_json, write_json, write_tensors, write_text, written
from diffusion_opt.names import data_dir

DATA_SETS = (FASHION_MNIST,)  # by the classes they hold, see `data_for`
CAPTIONED = (PORTRAITS,)  # pictures that are asked for in words, by name

__all__ = [
    "CAPTIONED",
    "DATA_SETS",
    "FASHION_CLASSES",
    "CaptionedDataSet",
    "CaptionedPictures",
    "CorruptFileError",
    "DataSet",
    "FolderInUseError",
    "ImageData",
    "data_dir",
    "data_for",
    "folder_lock",
    "load_fashion_mnist",
    "read_idx",
    "read_json",
    "verify",
    "write_json",
    "write_sums",
    "write_tensors",
    "write_text",
    "written",
]
