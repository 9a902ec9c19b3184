"""Where the kernels of this session run, and the tolerance they are held to.

Tests marked `interpreted` execute Triton kernels. `pytest -m interpreted` runs them on the CPU in Triton's interpreter
(tests/conftest.py sets TRITON_INTERPRET=1 before the kernels are imported); on a machine with a GPU,
`TRITON_INTERPRET=0 pytest -m interpreted` runs the same tests compiled. pytest reads this file before that happens, so
nothing of the package is imported at its top.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors must lie for the kernels to run: the CPU when interpreting, else the GPU."""
    from diffusion_opt.kernels import runtime

    return torch.device("cpu" if runtime.interpreting() else "cuda")
