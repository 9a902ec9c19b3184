"""How every check answers: the stub, the wrong answer with its hint, the right one.

Mistakes are recognized by their results: a check computes what the typical slips would give, and `compare` says which
one an answer equals. Test cases have all dimensions different, so that a mixed-up axis cannot pass.
"""

import math
from collections.abc import Callable, Iterable
from types import EllipsisType

import torch
from torch import Tensor

Answer = Callable | EllipsisType | None


class WrongAnswerError(AssertionError):
    """An exercise was answered, and not right; the message explains. Jupyter shows the message alone."""

    def _render_traceback_(self) -> list[str]:
        return [f"not right: {self}"]


def is_stub(answer: object) -> bool:
    return answer is None or answer is Ellipsis


def not_yet() -> None:
    print("not yet")  # and nothing that gives the answer away: this line is stored under the exercise


def praise(answer: object, lesson: str) -> None:
    """Say what to take along, and mark a function as one that `use` may hand out."""
    if callable(answer):
        answer.passed = True
    print(f"correct: {lesson}")


def use(mine: Answer, otherwise: Callable) -> Callable:
    """`mine` if its check has passed, `otherwise` (the package's own) as long as it has not.

    Figures after an exercise are then made by the reader's function. A cell that defines the function anew makes a new
    one, which has to pass again.
    """
    if getattr(mine, "passed", False):
        print(f"from here on: your {mine.__name__}")
        return mine
    return otherwise


def called(answer: Answer, arguments: tuple) -> object | None:
    """What the answer returns; None after "not yet" for a stub. Raises WrongAnswerError if it is no function."""
    if is_stub(answer):
        not_yet()
        return None
    if not callable(answer):
        raise WrongAnswerError(f"hand over the function itself, without calling it; got {type(answer).__name__}")
    try:
        found = answer(*arguments)
    except NotImplementedError:
        found = None
    if is_stub(found):
        not_yet()
        return None
    return found


def compare(found: object, expected: object, mistakes: Iterable[tuple[object, str]]) -> None:
    """Raises WrongAnswerError unless `found` equals `expected`, with the hint of the mistake it equals."""
    if isinstance(found, Tensor) and found.ndim == 0 and not isinstance(expected, Tensor):
        found = found.item()
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            raise WrongAnswerError(
                f"a tensor of shape {tuple(expected.shape)} is asked for, got {type(found).__name__}"
            )
        if found.shape != expected.shape:
            raise WrongAnswerError(f"the shape must be {tuple(expected.shape)}, got {tuple(found.shape)}")
    if _same(found, expected):
        return
    for wrong, hint in mistakes:
        if _same(found, wrong):
            raise WrongAnswerError(hint)
    if isinstance(expected, Tensor):
        raise WrongAnswerError(f"off by up to {(found - expected).abs().max().item():.3g} on a test case")
    raise WrongAnswerError(f"expected {expected:.6g} on a test case, got {found!r}")


def _same(found: object, expected: object) -> bool:
    if isinstance(expected, Tensor):
        return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
    return isinstance(found, int | float) and math.isclose(found, expected, rel_tol=1e-9)
