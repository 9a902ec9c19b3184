"""What can be asked for, and what is real: the two things that a loss wants of a subject.

A loss must not know whether a sample is asked for by a class or by a prompt, nor where real samples come from:

    Conditions     n of them, numbered; `conditions[index]` is a batch of them, `draw` a random one
    Samples        `draw(num, generator)`: real samples with their conditions (`datasets.ImageData` is one)

`Classes(n)` serves both kinds of model. A prompt of a fixed list is a class too: its text was encoded once into a table
(`models.PromptTable`) that stands in the network, and label n, after the last, asks for the empty prompt.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.flow import ClassCondition, Condition


class Conditions(Protocol):
    """A numbered list of conditions; none at all for a model that takes none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[Tensor, " b"]) -> Condition | None:
        """The conditions of these numbers, as one batch; None where there are none."""
        ...

    def draw(self, num: int, generator: torch.Generator) -> Condition | None:
        """A random batch, on the generator's device."""
        ...


class Samples(Protocol):
    """Real samples with their conditions."""

    def __len__(self) -> int: ...

    def draw(self, num: int, generator: torch.Generator) -> tuple[Float[Tensor, "num *s"], Condition]:
        """A random batch, with repetition, on the generator's device."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits of all that is in there."""
        ...


@dataclass(frozen=True, slots=True)
class Classes:
    """`num` classes, or prompts of a table; 0 for a model without conditions."""

    num: int = 0

    def __post_init__(self) -> None:
        if self.num < 0:
            raise ValueError(f"the number of classes must not be negative, got {self.num}")

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Int[Tensor, " b"]) -> ClassCondition | None:
        return ClassCondition(index, self.num) if self.num else None

    def draw(self, num: int, generator: torch.Generator) -> ClassCondition | None:
        """`num` random classes."""
        if not self.num:
            return None
        return self[torch.randint(self.num, (num,), generator=generator, device=generator.device)]


UNCONDITIONAL = Classes()
