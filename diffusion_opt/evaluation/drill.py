"""Fault drills: how often something was disturbed on purpose, and what came of it.

A drill disturbs one thing many times (it kills a process, flips a bit, changes a network between calls) and compares
what comes out with what comes out undisturbed. There are three ends: it held, the result is the undisturbed one, bit
for bit; it was refused, an error says what is wrong; or it is wrong, in silence or by an error that helps nobody. Only
the last one is a fault of the package, so its target is 0. Each room drills its own: `training/drill.py` kills, cuts
and flips; whoever keeps a state between calls adds a section of the same rows. `benchmarks/reliability.py` runs them.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

ENDS = ("held", "refused", "wrong")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of `tries` disturbances of one kind. Raises ValueError unless every try has one end."""

    section: str  # what was disturbed: "training run"
    fault: str  # how: "killed at a random moment"
    tries: int
    held: int  # the result was the undisturbed one, bit for bit
    refused: int = 0  # an error said what is wrong, and nothing was changed
    wrong: int = 0  # another result, or an error that does not say what to do
    examples: tuple[str, ...] = ()  # of what went wrong

    def __post_init__(self) -> None:
        if self.held + self.refused + self.wrong != self.tries or min(self.held, self.refused, self.wrong) < 0:
            raise ValueError(f"held, refused and wrong must add up to the tries, got {self}")

    @classmethod
    def of(cls, section: str, fault: str, ends: Iterable[str]) -> "Outcome":
        """Count the ends of all tries: "held", "refused", or a text that says what went wrong."""
        seen = list(ends)
        wrong = [end for end in seen if end not in ENDS[:2]]
        held, refused = (seen.count(end) for end in ENDS[:2])
        return cls(section, fault, len(seen), held, refused, len(wrong), tuple(dict.fromkeys(wrong))[:3])

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self) | {"examples": list(self.examples)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Outcome":
        """What `as_dict` gave."""
        return cls(**stored | {"examples": tuple(stored["examples"])})


def table(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as text, a row each, examples of what went wrong below."""
    rows = [(one.section, one.fault, str(one.tries), *(str(getattr(one, end)) for end in ENDS)) for one in outcomes]
    head = ("disturbed", "how", "tries", *ENDS)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join((*texts, *numbers)).rstrip())
    lines += [f"wrong, {one.section}, {one.fault}: {example}" for one in outcomes for example in one.examples]
    return "\n".join(lines)
