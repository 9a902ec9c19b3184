"""Where a kernel runs: compiled on a CUDA device, interpreted for a test, or not at all.

Each operation of this room has two bodies, a Triton kernel and a plain PyTorch reference. Which one a call takes is
decided by its tensors and by one fact about the process:

    CUDA tensor                                          "cuda"       the compiled kernel
    CPU tensor, TRITON_INTERPRET=1                       "interpret"  the kernel's source, executed with numpy
    CPU tensor otherwise                                 "reference"  PyTorch

The interpreter executes a kernel tile by tile in Python, hundreds of times slower than PyTorch, so it is for tests and
teaching and never chosen on its own. Triton reads `TRITON_INTERPRET` when a kernel is decorated, that is when its
module is imported: set it before, or not at all. It is read here once, for the whole process.

`run` is the only place that starts a kernel: it selects the device of the tensors, and puts the repairs of
`interpreter.py` around an interpreted run.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_opt.kernels.launch import ARCHITECTURES

Mode = Literal["cuda", "interpret", "reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
INTERPRETED_ARCH = 90  # the interpreter has no architecture: it runs the tiles of this one


def interpreting() -> bool:
    """Whether kernels of this process are interpreted: TRITON_INTERPRET was set when this module was imported."""
    return INTERPRETING


def mode(tensor: Tensor) -> Mode:
    """How a kernel on this tensor runs.

    Raises RuntimeError for a CUDA tensor without Triton: the caller must choose PyTorch then, and say so.
    """
    if INTERPRETING:
        return "interpret"
    if not tensor.is_cuda:
        return "reference"
    if not HAS_TRITON:
        raise RuntimeError("a CUDA tensor needs Triton, which is not installed: pip install triton==3.7.1")
    return "cuda"


def architecture(device: torch.device) -> int:
    """The launch table's architecture for a device: the newest listed one that is not newer than the device.

    sm_86 takes the choices of 80, sm_103 of 100, sm_121 of 120. Raises ValueError below compute capability 8.0, where
    bf16 matrix units are missing.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    known = [arch for arch in ARCHITECTURES if arch <= capability]
    if not known:
        raise ValueError(f"compute capability {major}.{minor} is below 8.0, the oldest these kernels are made for")
    return known[-1]


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a Triton kernel on a grid of programs, on the device of its first tensor.

    `constants` are the kernel's constexpr arguments and Triton's own `num_warps` and `num_stages`.
    """
    with _surroundings(arguments):
        kernel[grid](*arguments, **constants)


def _surroundings(arguments: tuple[Any, ...]) -> AbstractContextManager:
    if INTERPRETING:
        from diffusion_opt.kernels.interpreter import repaired  # needs Triton, so not at the top

        return repaired()
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return torch.cuda.device(tensors[0].device) if tensors else nullcontext()
