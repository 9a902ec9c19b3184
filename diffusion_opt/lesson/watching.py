"""Watch how the network's work changes from step to step, also in the pairs that TeaCache is calibrated on.

    x = d(m_i, m_{i-1})     change of block 0's modulated input, known before the blocks run
    y = d(r_i, r_{i-1})     change of the residual of the stack, known after;   d(a, b) = mean|a - b| / mean|b|

`caching.calibration` keeps only what it fits to them; a lesson wants to show the pairs themselves.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.calibration.curve import relative_change
from diffusion_opt.caching.step.stack import StackCut, StackPass
from diffusion_opt.models.block_stack import Streams


class _Watch:
    """A controller that skips nothing and keeps input and residual of each pass."""

    probe_blocks = 0

    def __init__(self) -> None:
        self.passes: dict[str | None, list[tuple[Tensor, Tensor]]] = {}

    def begin(self, stack: StackPass) -> None:
        return None

    def computed(self, stack: StackPass, residual: Streams) -> None:
        main = next(iter(residual.values()))
        self.passes.setdefault(stack.context, []).append((stack.modulated(), main))

    def finished(self, stack: StackPass, output: Tensor) -> None:
        """The output is of no interest here."""

    def end_generation(self) -> None:
        """The passes are kept for who asked for them."""


def change_map(values: Sequence[Float[Tensor, "b *s"]]) -> Float[Tensor, "steps steps"]:
    """How far the value of the step in each row is from that in each column, relative to the length of the latter."""
    flat = torch.stack(list(values)).flatten(1)
    return torch.stack([(flat - one).norm(dim=1) for one in flat]) / flat.norm(dim=1)


def change_pairs(
    pipe: DiffusionPipeline, generate: Callable[[], object]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The changes x and y of every sample, step and guidance branch of one generation, which `generate` runs.

    The pipeline is left as it was. Raises ValueError if its transformer cannot be cut or has a cache on it.
    """
    watch = _Watch()
    cut = StackCut(pipe.transformer, watch)
    cut.attach(pipe.transformer)
    try:
        generate()
    finally:
        cut.detach(pipe.transformer)
    steps = [two for passes in watch.passes.values() for two in pairwise(passes)]
    x, y = (torch.cat([relative_change(new[part], old[part]) for old, new in steps]) for part in (0, 1))
    return x.cpu(), y.cpu()
