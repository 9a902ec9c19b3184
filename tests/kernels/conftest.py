"""Where kernels run: tests marked `interpreted` take the GPU if there is one, else Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors must lie for the kernels to run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def kernels_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpret the kernels that a marked test starts on CPU tensors."""
    if not request.node.get_closest_marker("interpreted"):
        yield
        return
    from diffusion_opt.kernels.runtime import interpreted  # not at the top: the shape-check hook comes first

    with interpreted():
        yield
