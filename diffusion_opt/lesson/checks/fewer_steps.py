"""Exercises of lesson 02."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from types import EllipsisType

import torch
from torch import Tensor

from diffusion_opt.flow import GaussianMixtureVelocity, VelocityModel, adams_bashforth2, euler, heun, sampling_times
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, is_stub, not_yet, praise

SHARP_RING = GaussianMixtureVelocity.ring(num_modes=5, radius=1.0, std=0.1)
SHIFT_STEPS = 8


def ex_02_1(answer: Answer) -> None:
    """heun_by_hand(model, x, times): Heun's method."""
    if _check_solver(answer, heun, 2, _heun_mistakes()):
        praise(answer, "order 2 for two evaluations per step: compare it with Euler at twice the steps")


def ex_02_2(answer: Answer) -> None:
    """adams_bashforth_by_hand(model, x, times): the two-step Adams-Bashforth method on any grid."""
    sign = "the sign: v - v' is how the velocity changed; it goes on changing that way, so add it"
    mistakes = (
        (_two_step(lambda h, h_old: 0.0), "this is Euler: is the velocity of the step before ever kept and used?"),
        (_two_step(lambda h, h_old: -h / (2 * h_old)), sign),
        (
            _two_step(lambda h, h_old: 0.5),
            "right for equal steps only (3/2 and -1/2): with uneven steps the factor is h / (2 h')",
        ),
        (
            _two_step(lambda h, h_old: h_old / (2 * h)),
            "the steps are swapped: the factor is h / (2 h'), h' the one before",
        ),
        (
            _two_step(lambda h, h_old: h / h_old),
            "a 2 is missing: the factor is h / (2 h'), the middle of the coming step",
        ),
    )
    if _check_solver(answer, adams_bashforth2, 1, mistakes):
        praise(answer, "order 2 for one evaluation per step: as cheap as Euler")


def ex_02_3(answer: float | EllipsisType | None) -> None:
    """chosen_shift: a shift of the time grid that suits a sharp mixture."""
    if is_stub(answer):
        not_yet()
        return
    if not isinstance(answer, int | float) or isinstance(answer, bool) or not 0 < answer < math.inf:
        raise WrongAnswerError(f"a shift is a positive number (1 leaves the times even), got {answer!r}")
    error, even = (shift_error(shift) for shift in (float(answer), 1.0))
    if error > even / 3:
        if answer == 1:
            hint = "1 is the even grid itself"
        elif answer > 1:
            hint = (
                "a shift above 1 puts the steps near the noise, as large images need; here the modes are small against "
                "the noise, so the paths turn late: try below 1"
            )
        elif answer < 0.3:
            hint = "too far: nearly all steps are at the end now, and the first one jumps over the rest"
        else:
            hint = "the right direction, but not far enough"
        raise WrongAnswerError(f"error {error:.3f} against {even:.3f} for even times; at most a third is asked. {hint}")
    praise(answer, f"{even / error:.1f} times less error at the same {SHIFT_STEPS} evaluations; it costs nothing")


def shift_error(shift: float) -> float:
    """Root mean square error of Adams-Bashforth with 8 steps on the sharp ring, on a grid with this shift."""
    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = heun(SHARP_RING, x, sampling_times(400))
    found = adams_bashforth2(SHARP_RING, x, sampling_times(SHIFT_STEPS, shift=shift))
    return (found - fine).square().mean().sqrt().item()


class _Counted:
    """A velocity model that counts its calls."""

    def __init__(self, model: VelocityModel) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x_t: Tensor, t: Tensor, condition=None, r=None) -> Tensor:
        self.calls += 1
        return self.model(x_t, t, condition)


def _check_solver(answer: Answer, solver: Callable, evaluations: int, mistakes: Iterable[tuple[Callable, str]]) -> bool:
    """Compare a solver and its evaluations with the package's on a smooth mixture, uneven grid; False for a stub."""
    ring = GaussianMixtureVelocity.ring(num_modes=5, radius=1.0, std=0.4)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    times = sampling_times(5, shift=2.5)
    model = _Counted(ring)
    found = called(answer, (model, x.clone(), times))
    if found is None:
        return False
    compare(found, solver(ring, x, times), [(mistake(ring, x, times), hint) for mistake, hint in mistakes])
    steps = len(times) - 1
    if model.calls != evaluations * steps:
        raise WrongAnswerError(
            f"the result is right, but it took {model.calls} evaluations for {steps} steps, and {evaluations * steps} "
            "are enough: keep what was computed"
        )
    return True


def _heun_mistakes() -> list[tuple[Callable, str]]:
    """Wrong slopes of a step from t to r, as functions of v(x, t) and the step."""

    def by_slope(slope: Callable) -> Callable:
        def solve(model: VelocityModel, x: Tensor, times: Tensor) -> Tensor:
            def at(x: Tensor, t: float) -> Tensor:
                return model(x, torch.full((len(x),), t, dtype=x.dtype))

            for t, r in pairwise(times.tolist()):
                x = x + (r - t) * slope(at, x, at(x, t), t, r)
            return x

        return solve

    return [
        (euler, "this is Euler: the velocity at the end of the step is missing"),
        (
            by_slope(lambda at, x, v, t, r: at(x + (r - t) * v, r)),
            "only the velocity at the end is used; Heun takes the mean of both ends",
        ),
        (
            by_slope(lambda at, x, v, t, r: (v + at(x, r)) / 2),
            "the second velocity is taken at the old point; take it where an Euler step leads",
        ),
        (
            by_slope(lambda at, x, v, t, r: (v + at(x + (r - t) * v, t)) / 2),
            "the second velocity is taken at time t; at the end of the step the time is r",
        ),
        (
            by_slope(lambda at, x, v, t, r: (v + at(x - (r - t) * v, r)) / 2),
            "the Euler step to the end goes the wrong way: x + (r - t) v, and r - t is negative",
        ),
        (
            by_slope(lambda at, x, v, t, r: v + at(x + (r - t) * v, r)),
            "the sum of both velocities moves twice too far; take their mean",
        ),
        (
            by_slope(lambda at, x, v, t, r: at(x + (r - t) / 2 * v, (t + r) / 2)),
            "this is the midpoint method: order 2 as well, but not Heun's, which averages both ends",
        ),
    ]


def _two_step(factor: Callable[[float, float], float]) -> Callable:
    """A two-step method x <- x + h [v + factor(h, h') (v - v')] that starts with an Euler step."""

    def solve(model: VelocityModel, x: Tensor, times: Tensor) -> Tensor:
        previous = None
        for t, r in pairwise(times.tolist()):
            h = r - t
            v = model(x, torch.full((len(x),), t, dtype=x.dtype))
            change = 0.0 if previous is None else factor(h, previous[1]) * (v - previous[0])
            x = x + h * (v + change)
            previous = (v, h)
        return x

    return solve
