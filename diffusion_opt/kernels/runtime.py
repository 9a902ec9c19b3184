"""Where a kernel runs: compiled on a CUDA device, interpreted for a test, or not at all.

Each operation of this room has two bodies, a Triton kernel and a plain PyTorch reference. Which one a call takes is
decided by its tensors and by where the call stands:

    CUDA tensor                                 "cuda"       the compiled kernel
    CPU tensor inside `with interpreted():`     "interpret"  the kernel's source, executed with numpy
    CPU tensor otherwise                        "reference"  PyTorch

The interpreter executes a kernel tile by tile in Python, hundreds of times slower than PyTorch, so it is for tests and
teaching and never chosen on its own. Triton's own switch, the variable TRITON_INTERPRET, is read when a kernel is
decorated and holds for the whole process; here one process can interpret a kernel and compile it too.

`run` is the only place that starts a kernel: it selects the device of the tensors, and puts the repairs of
`interpreter.py` around an interpreted run.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_opt.kernels.launch import ARCHITECTURES

Mode = Literal["cuda", "interpret", "reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED_ARCH = 90  # the interpreter has no architecture: it runs the tiles of this one

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """In this block kernels run on CPU tensors, in Triton's interpreter. Raises RuntimeError without Triton."""
    if not HAS_TRITON:
        raise RuntimeError("the interpreter is part of Triton, which exists on Linux only: pip install triton==3.7.1")
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    """Whether this is inside `with interpreted():`."""
    return _interpreted.get()


def mode(tensor: Tensor) -> Mode:
    """How a kernel on this tensor runs.

    Raises RuntimeError for a CUDA tensor without Triton: the caller must choose PyTorch then, and say so.
    """
    if not tensor.is_cuda:
        return "interpret" if interpreting() else "reference"
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


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, scratch: bool = False, **constants: Any) -> None:
    """Start a Triton kernel on a grid of programs, on the device of its first tensor.

    `constants` are the kernel's constexpr arguments and Triton's own `num_warps` and `num_stages`. Kernels that make
    tensor descriptors need `scratch` memory on the device to keep them in.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    on_gpu = bool(tensors) and tensors[0].is_cuda
    if interpreting() and not on_gpu:
        from diffusion_opt.kernels.interpreter import interpretable, repaired  # need Triton, so not at the top

        with repaired():
            interpretable(kernel)[grid](*arguments, **constants)
        return
    here: AbstractContextManager = torch.cuda.device(tensors[0].device) if on_gpu else nullcontext()
    with here:
        if scratch:
            copy_context().run(_with_scratch, kernel[grid], *arguments, **constants)
        else:
            kernel[grid](*arguments, **constants)


def _with_scratch(start: Callable[..., Any], *arguments: Any, **constants: Any) -> None:
    """Start a kernel with torch's allocator for what it asks for; in a context of its own, so that no setting stays."""
    import triton

    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    start(*arguments, **constants)
