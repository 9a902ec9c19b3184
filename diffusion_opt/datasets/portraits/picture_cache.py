"""Pictures drawn once and then read from disk: a memory-mapped array, finished or resumed, never half.

Drawing 40,000 pictures takes minutes, reading them nothing: the file is mapped and pages come as they are used. It is
named after a fingerprint of all that decides its content (the portraits, the parts, the renderer's version and
the size), so a changed table draws anew and an unchanged one never does. Pictures are drawn into a file of another name
with a count beside it that follows every block; an interrupted run goes on at the last whole block, and the file gets
its name when it is complete. A lock keeps two processes from drawing into one folder.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from diffusion_opt.datasets.folder_lock import folder_lock
from diffusion_opt.datasets.integrity import SUMS, verify
from diffusion_opt.datasets.portraits.drawing import draw
from diffusion_opt.datasets.portraits.portrait import Portrait, Split, sample
from diffusion_opt.datasets.portraits.tables import TABLES
from diffusion_opt.datasets.writing import CorruptFileError, flush, read_json, write_json
from diffusion_opt.names import data_dir

_BLOCK = 256  # pictures between two marks of progress


def pictures(
    count: int, seed: int, split: Split, cache: Path, size: int = 128, threads: int = 1
) -> UInt8[Tensor, "n 3 size size"]:
    """The pictures of `sample(count, seed, split)`, mapped from a file in the folder `cache`, drawn first if needed.

    The tensor shares the file's pages; what is written to it stays in memory and never reaches the file. Raises
    FolderInUseError while another process draws into the folder, and OSError for a full disk.
    """
    portraits = sample(count, seed, split)
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"portraits-{split}-{seed}-{count}-{fingerprint(portraits, size)}.npy"
    if not path.is_file():
        with folder_lock(cache):
            _draw_into(path, portraits, size, threads)
    mapped = np.load(path, mmap_mode="c")
    if mapped.shape != (count, 3, size, size) or mapped.dtype != np.uint8:
        raise CorruptFileError(f"{path} holds {mapped.dtype} {mapped.shape}; remove it, it is drawn again")
    return torch.from_numpy(mapped)


def fingerprint(portraits: Sequence[Portrait], size: int = 128) -> str:
    """16 hex digits of everything that decides the pixels: portraits, tables, parts, renderer and size."""
    folder = data_dir() / "portraits"
    verify(folder)
    digest = hashlib.sha256((folder / SUMS).read_bytes())
    digest.update(f"{version('resvg_py')} {size} {TABLES!r}".encode())
    for portrait in portraits:
        digest.update(repr(portrait).encode())
    return digest.hexdigest()[:16]


def _draw_into(path: Path, portraits: Sequence[Portrait], size: int, threads: int) -> None:
    """Draw into `path`.part, going on where its count of finished pictures says, then give it its name."""
    part, progress = path.with_suffix(".part"), path.with_suffix(".json")
    shape = (len(portraits), 3, size, size)
    done = read_json(progress, f"remove {progress}")["done"] if part.is_file() and progress.is_file() else 0
    out = np.lib.format.open_memmap(part, "r+") if done else np.lib.format.open_memmap(part, "w+", np.uint8, shape)
    if out.shape != shape:
        raise CorruptFileError(f"{part} holds pictures of shape {out.shape}, not {shape}; remove it")
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(portraits), initial=done, desc="drawing portraits", unit="picture") as bar,
    ):
        while done < len(portraits):
            block = portraits[done : done + _BLOCK]
            for row, picture in enumerate(pool.map(lambda one: draw(one, size), block), start=done):
                out[row] = picture.numpy()
            done += len(block)
            out.flush()
            write_json(progress, {"done": done})
            bar.update(len(block))
    del out
    flush(part)
    os.replace(part, path)
    flush(path.parent)
    progress.unlink()
