"""A policy that does what it is told, for tests of what carries it out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffusion_opt.caching.region.policy import Choice, PassDone, Seen
from diffusion_opt.caching.region.session import RegionSession, attach, detach


class Script:
    """Computes all tokens until `index` is set; keeps what it saw."""

    def __init__(self, slot_per_step: bool = True) -> None:
        self.slot_per_step = slot_per_step
        self.index: Tensor | None = None
        self.alarmed = False
        self.seen: list[Seen] = []
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1

    def choose(self, seen: Seen) -> Choice:
        self.seen.append(seen)
        return Choice(self.index, "as told")

    def judge(self, choice: Choice, new: Tensor, old: Tensor) -> bool:
        return self.alarmed

    def remedy(self, passes: Sequence[PassDone]) -> None:
        return None


@contextmanager
def scripted(
    module: nn.Module, slot_per_step: bool = True, **storage: object
) -> Iterator[tuple[Script, RegionSession]]:
    """A transformer with the region cache under a script, without gradients; passes are named "default"."""
    script = Script(slot_per_step)
    with torch.no_grad():
        session = attach(module, script, **storage)
        with module.cache_context("default"):
            yield script, session
        detach(module)
