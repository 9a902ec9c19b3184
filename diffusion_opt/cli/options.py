"""What several commands share: the device, torch's threads, and a folder to write to."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
RUNS = Path("runs")


def settle(device: Device, threads: int | None) -> str:
    """Set torch's threads and choose the device. Raises ValueError if a GPU was asked for and there is none."""
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no NVIDIA GPU here; leave the flag out, or see `diffusion-opt doctor`"
        )
    return device


def writable(folder: Path) -> None:
    """Make a folder before the long work starts. Raises ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # of a name of its own: several processes may ask at once
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from error
