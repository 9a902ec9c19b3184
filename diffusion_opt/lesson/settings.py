"""How lessons run on this machine, read once from the environment.

A lesson has two sizes. The full one is what a reader runs and what its stored outputs show; the fast one proves in
seconds that every cell still works. Both numbers stand in the notebook, so nothing is hidden:

    num_images = budget(full=400, fast=8)

    DIFFUSION_OPT_FAST       1 for the fast size, 0 (default) for the full one
    DIFFUSION_OPT_DEVICE     cpu (default: the lessons are sized for it), cuda, cuda:1, mps
    DIFFUSION_OPT_SEED       seed of every lesson, default 0
    DIFFUSION_OPT_THREADS    threads of torch, default one for each usable core

No other file of the package reads these variables.
"""

import os
from dataclasses import dataclass
from functools import cache

import torch

from diffusion_opt.evaluation.machine import usable_cores


@dataclass(frozen=True, slots=True)
class Settings:
    """Size, device, seed and threads of a lesson."""

    fast: bool
    device: str
    seed: int
    threads: int

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh generator on the CPU, seeded with seed + offset: the same noise on every device."""
        return torch.Generator().manual_seed(self.seed + offset)


@cache
def settings() -> Settings:
    """The settings of this process; the environment is read at the first call.

    Raises ValueError naming the variable, the value found and what is allowed.
    """
    fast = _read("DIFFUSION_OPT_FAST", "0")
    if fast not in ("0", "1"):
        raise ValueError(f"DIFFUSION_OPT_FAST must be 1 (fast) or 0 (full), got {fast!r}")
    return Settings(
        fast=fast == "1",
        device=_device(_read("DIFFUSION_OPT_DEVICE", "cpu")),
        seed=_whole_number("DIFFUSION_OPT_SEED", "0", smallest=0),
        threads=_whole_number("DIFFUSION_OPT_THREADS", str(usable_cores()), smallest=1),
    )


def budget(*, full: int, fast: int) -> int:
    """The first number in a lesson of full size, the second in fast mode. Raises ValueError unless fast <= full."""
    if fast > full:
        raise ValueError(f"the fast size must not exceed the full one, got fast={fast} and full={full}")
    return fast if settings().fast else full


def _read(variable: str, default: str) -> str:
    return os.environ.get(variable, "").strip() or default


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"DIFFUSION_OPT_DEVICE must be a torch device such as cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"DIFFUSION_OPT_DEVICE is {name!r}, but torch finds no CUDA device; unset it or use cpu")
    return name


def _whole_number(variable: str, default: str, smallest: int) -> int:
    text = _read(variable, default)
    if not text.isdecimal() or int(text) < smallest:
        raise ValueError(f"{variable} must be a whole number of at least {smallest}, got {text!r}")
    return int(text)
