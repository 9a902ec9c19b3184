"""Exercises of lesson 05."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusion_opt.flow import sampling_times
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise

CHANGES = (0.05, 0.1, 0.2, 0.02, 0.04, 0.3, 0.05, 0.05, 0.11, 0.02)
THRESHOLD = 0.2


def ex_05_1(answer: Answer) -> None:
    """times_of_reuse(times, mask): the grid on which plain Euler does what reuse does."""
    times, mask = sampling_times(6, shift=2.5), torch.tensor([True, False, True, True, False, False])
    try:
        found = called(answer, (times, mask))
    except IndexError as error:
        raise WrongAnswerError(
            f"shapes do not fit ({error}); times has one entry more than mask, its last one is the end of the walk"
        ) from error
    if found is None:
        return
    starts, end = times[:-1], times[-1:]
    mistakes = (
        (starts[mask], "the end is missing: on this grid Euler stops where it last looked, before the picture is done"),
        (times, "this is the grid that the cache walks on; it looks at fewer of these times, and only looking costs"),
        (torch.cat([starts[~mask], end]), "these are the steps that were skipped"),
        (torch.cat([times[:1], times[1:][mask]]), "a step from times[i] to times[i + 1] looks at times[i], its start"),
        (
            sampling_times(int(mask.sum())),
            "the right number of steps, but these are even times: Euler must look where the mask computes",
        ),
    )
    _hint(found, mistakes)
    compare(found, torch.cat([starts[mask], end]), ())
    praise(answer, "reuse is Euler with fewer steps: that, and not the full run, is what a cache has to beat")


def ex_05_2(answer: Answer) -> None:
    """forecast(kept, t): the straight line through the last two of kept = [(time, value), ...], at time t."""
    first, old, new = torch.tensor([[1.0, -2.0, 0.5], [0.4, 1.0, 3.0], [2.0, 0.7, -1.0]], dtype=torch.float64)
    (s, r), t = (0.9, 0.6), 0.5
    found = called(answer, ([(1.0, first), (s, old), (r, new)], t))
    if found is None:
        return
    change, share = new - old, (t - r) / (r - s)
    mistakes = (
        (new, "this is reuse: how the value changed from the one before to the last is not used"),
        (
            new + change,
            "this counts computed steps, as if all were equally far apart; go as far as the times say: "
            "(t - r) / (r - s)",
        ),
        (new - change * share, "the sign: the value goes on changing the way it did, so add"),
        (new + change / share, "upside down: the way to go, t - r, is divided by the way between the two, r - s"),
        (old + change * share, "start from the newer of the two; t lies behind it"),
        (new + change * (t - r), "a change per time is (new - old) / (r - s); the division is missing"),
        (old + (old - first) * (t - s) / (s - 1.0), "these are the two oldest: the line goes through the two newest"),
        (
            new + (new - first) * (t - r) / (r - 1.0),
            "the line goes through the two newest; this one skips the value between",
        ),
    )
    compare(found, new + change * share, mistakes)
    compare(answer([(s, old)], t), old, ((old * 0, "with one value kept there is no line: reuse it"),))
    praise(answer, "order 2 for one more tensor in memory; a second-order solver does the same with its velocities")


def ex_05_3(answer: Answer) -> None:
    """computed_steps(changes, threshold): TeaCache's decisions, True for each step that is computed."""
    found = called(answer, (list(CHANGES), THRESHOLD))
    if found is None:
        return
    if not isinstance(found, list | tuple | Tensor) or len(found) != len(CHANGES) + 1:
        got = f"{len(found)}" if isinstance(found, list | tuple | Tensor) else type(found).__name__
        raise WrongAnswerError(
            f"{len(CHANGES)} changes lie between {len(CHANGES) + 1} steps, and each step needs a True or False "
            f"(the first is always computed); got {got}"
        )
    decided = torch.as_tensor([bool(one) for one in found])
    right = _decisions()
    unforced = right.clone()
    unforced[-1] = False
    mistakes = (
        (~right, "the other way round: True is a step that is computed"),
        (unforced, "the last step is always computed: no later one could make up for an error there"),
        (_decisions(adds_up=False), "each change is compared alone; small ones must add up until a step is due"),
        (
            _decisions(after=lambda total, change: total),
            "the sum is never set back to 0, so all is computed once it is full",
        ),
        (
            _decisions(after=lambda total, change: total - THRESHOLD),
            "set the sum to 0, do not take the threshold off it",
        ),
        (
            _decisions(after=lambda total, change: change),
            "the change that made a step due is covered by computing it: set the sum to 0, not to that change",
        ),
    )
    compare(decided.double(), right.double(), [(wrong.double(), hint) for wrong, hint in mistakes])
    praise(answer, "one number decides for every step; what it is worth depends on how well the changes are known")


def _hint(found: object, mistakes: Iterable[tuple[Tensor, str]]) -> None:
    """Raises WrongAnswerError with the hint of the mistake that was made, mistakes of other shapes among them."""
    for wrong, hint in mistakes:
        if isinstance(found, Tensor) and found.shape == wrong.shape and torch.allclose(found.to(wrong), wrong):
            raise WrongAnswerError(hint)


def _set_to_zero(total: float, change: float) -> float:
    return 0.0


def _decisions(adds_up: bool = True, after: Callable[[float, float], float] = _set_to_zero) -> Bool[Tensor, " n"]:
    """The decisions on CHANGES; `after` gives the sum after a computed step; without `adds_up` nothing is summed."""
    mask, total = [True], 0.0
    for change in CHANGES:
        total = total + change if adds_up else change
        mask.append(total >= THRESHOLD)
        if mask[-1]:
            total = after(total, change)
    return torch.tensor([*mask[:-1], True])
