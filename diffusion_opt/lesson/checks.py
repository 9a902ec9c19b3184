"""Checks of the exercises: `checks.ex_02_1(my_answer)`.

Each check answers in one of three ways. A stub (`...`, None, or a function that returns one of them or raises
NotImplementedError) gets "not yet: …" with the next thing to do, and no error, so that a notebook with open exercises
runs to its end. A wrong answer raises WrongAnswerError; where it equals a typical mistake, the message says which one.
A right answer gets "correct: …" with what to take along. An error inside the reader's own function is left as it is.

Mistakes are recognized by their results: each check computes what the typical slips would give and compares. Test
cases have all dimensions different, so that a mixed-up axis cannot pass.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from types import EllipsisType

import torch
from torch import Tensor

from diffusion_opt.evaluation import count
from diffusion_opt.flow import (
    GaussianMixtureVelocity,
    VelocityModel,
    adams_bashforth2,
    clean_from_velocity,
    euler,
    heun,
    sampling_times,
)
from diffusion_opt.models import load
from diffusion_opt.recipes import TECHNIQUES, Recipe

Answer = Callable | EllipsisType | None
SHARP_RING = GaussianMixtureVelocity.ring(num_modes=5, radius=1.0, std=0.1)
SHIFT_STEPS = 8


class WrongAnswerError(AssertionError):
    """An exercise was answered, and not right; the message explains. Jupyter shows the message alone."""

    def _render_traceback_(self) -> list[str]:
        return [f"not right: {self}"]


def ex_00_1(answer: Answer) -> None:
    """clean_prediction(x_t, v, t): the clean picture from a point of the path and the velocity there."""
    generator = torch.Generator().manual_seed(1)
    x_t, v = (torch.randn(2, 3, 5, 7, generator=generator) for _ in range(2))
    t = torch.tensor([0.25, 0.8])
    column = t.reshape(-1, 1, 1, 1)
    todo = "from x_t = (1 - t) x + t e and v = e - x, remove e and return x (t holds one time per picture)"
    try:
        found = _called(answer, (x_t, v, t), todo)
    except RuntimeError as error:
        raise WrongAnswerError(
            f"shapes do not fit ({error}); t has shape (B,), one time per picture: reshape it to (B, 1, 1, 1) first"
        ) from error
    if found is None:
        return
    mistakes = (
        (x_t + column * v, "the sign: v = e - x points towards the noise, so the way back to x is against it"),
        (x_t - v, "the time is missing: x_t is only t of the way to the noise, so only t v has to be taken back"),
        (x_t - (1 - column) * v, "t and 1 - t are swapped: here t = 1 is noise and t = 0 is data"),
        (x_t + (1 - column) * v, "this is the noise e = x_t + (1 - t) v; the exercise asks for the picture x"),
    )
    _compare(found, clean_from_velocity(x_t, v, t), mistakes)
    _praise("a network that predicts v predicts the clean picture at every step")


def ex_01_1(answer: Answer) -> None:
    """attention_macs(num_tokens, width): multiply-accumulates of one self-attention layer."""
    todo = "add the four projections (each n x d times d x d) and the two products of n x n scores with width d"
    n, d = 50, 256
    found = _called(answer, (n, d), todo)
    if found is None:
        return
    projection, product = n * d * d, n * n * d
    mistakes = (
        (2 * product, "the projections are missing: queries, keys, values and output, each n d d"),
        (4 * projection, "the attention itself is missing: scores n n d, and the values they gather, n n d"),
        (3 * projection + 2 * product, "the output projection is missing: there are four, not three"),
        (4 * projection + product, "the scores gather the values: a second product of n n d"),
        (
            2 * (4 * projection + 2 * product),
            "these are FLOPs: one MAC is a multiplication with its addition, two FLOPs",
        ),
    )
    _compare(found, 4 * projection + 2 * product, mistakes)
    _praise(f"attention overtakes its projections where n = 2 d, here at {2 * d} tokens")


def ex_01_2(answer: Answer) -> None:
    """amdahl(share, factor): speed-up of the whole if `share` of the time becomes `factor` times faster."""
    share, factor = 0.7, 4.0
    found = _called(
        answer, (share, factor), "the new time is (1 - share) + share / factor; return old time over new time"
    )
    if found is None:
        return
    mistakes = (
        ((1 - share) + share / factor, "this is the new time; the speed-up is the old time, 1, over it"),
        (factor, "only a share of the time got faster; the rest is as slow as before"),
        (1 / (1 - share), "this is the limit for an endless factor; the fast part still takes share / factor"),
        (1 + share * (factor - 1), "speed-ups do not average: times add, so add up the new times and divide"),
    )
    _compare(found, 1 / ((1 - share) + share / factor), mistakes)
    _praise("what is left untouched sets the limit, 1 / (1 - share)")


def ex_02_1(answer: Answer) -> None:
    """heun_by_hand(model, x, times): Heun's method."""
    todo = "an Euler step to the end, a second velocity there, then the same step with the mean of both"
    if _check_solver(answer, heun, 2, todo, _heun_mistakes()):
        _praise("order 2 for two evaluations a step: compare it with Euler at twice the steps")


def ex_02_2(answer: Answer) -> None:
    """adams_bashforth_by_hand(model, x, times): the two-step Adams-Bashforth method on any grid."""
    todo = "keep the velocity and step of the step before, and use v + h / (2 h') (v - v'); the first step is Euler's"
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
    if _check_solver(answer, adams_bashforth2, 1, todo, mistakes):
        _praise("order 2 for one evaluation a step: as cheap as Euler")


def ex_02_3(answer: float | EllipsisType | None) -> None:
    """chosen_shift: a shift of the time grid that suits a sharp mixture."""
    if _is_stub(answer):
        _not_yet("try shifts on both sides of 1 with the slider above and set the best as a number")
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
    _praise(f"{even / error:.1f} times less error at the same {SHIFT_STEPS} evaluations; it costs nothing")


def shift_error(shift: float) -> float:
    """Root mean square error of Adams-Bashforth with 8 steps on the sharp ring, on a grid with this shift."""
    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = heun(SHARP_RING, x, sampling_times(400))
    found = adams_bashforth2(SHARP_RING, x, sampling_times(SHIFT_STEPS, shift=shift))
    return (found - fine).square().mean().sqrt().item()


def _is_stub(answer: object) -> bool:
    return answer is None or answer is Ellipsis


def _not_yet(todo: str) -> None:
    print(f"not yet: {todo}")


def _praise(lesson: str) -> None:
    print(f"correct: {lesson}")


def _called(answer: Answer, arguments: tuple, todo: str) -> object | None:
    """What the answer returns; None after "not yet" for a stub. Raises WrongAnswerError if it is no function."""
    if _is_stub(answer):
        _not_yet(todo)
        return None
    if not callable(answer):
        raise WrongAnswerError(f"hand over the function itself, without calling it; got {type(answer).__name__}")
    try:
        found = answer(*arguments)
    except NotImplementedError:
        found = None
    if _is_stub(found):
        _not_yet(todo)
        return None
    return found


def _compare(found: object, expected: object, mistakes: Iterable[tuple[object, str]]) -> None:
    """Raises WrongAnswerError unless `found` equals `expected`, with the hint of the mistake it equals."""
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


class _Counted:
    """A velocity model that counts its calls."""

    def __init__(self, model: VelocityModel) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x_t: Tensor, t: Tensor, condition=None, r=None) -> Tensor:
        self.calls += 1
        return self.model(x_t, t, condition)


def _check_solver(
    answer: Answer, solver: Callable, evaluations: int, todo: str, mistakes: Iterable[tuple[Callable, str]]
) -> bool:
    """Compare a solver and its evaluations with the package's on a smooth mixture, uneven grid; False for a stub."""
    ring = GaussianMixtureVelocity.ring(num_modes=5, radius=1.0, std=0.4)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    times = sampling_times(5, shift=2.5)
    model = _Counted(ring)
    found = _called(answer, (model, x.clone(), times), todo)
    if found is None:
        return False
    _compare(found, solver(ring, x, times), [(mistake(ring, x, times), hint) for mistake, hint in mistakes])
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


def ex_12_1(answer: tuple[str, str] | EllipsisType | None) -> None:
    """conflict: two techniques of different kinds that a recipe may hold and the shipped pipelines refuse together."""
    if _is_stub(answer):
        _not_yet('name two techniques, such as ("student", "dynamic_int8"); the cells above print what refuses')
        return
    if not isinstance(answer, tuple | list | set | frozenset) or len(answer) != 2:
        raise WrongAnswerError(f"a pair of two names is asked for, got {answer!r}")
    if unknown := sorted(str(name) for name in answer if name not in TECHNIQUES):
        raise WrongAnswerError(f"there is no technique {unknown[0]!r}; there are {', '.join(TECHNIQUES)}")
    first, second = (TECHNIQUES[name][1] for name in answer)
    if first == second:
        raise WrongAnswerError(
            f"these exclude each other because both change the {first.name}, so no recipe can hold them; a pair of "
            "different kinds is asked for, which a recipe holds and a pipeline refuses"
        )
    if set(answer) == {"student", "tea_cache"}:
        raise WrongAnswerError(
            "these compete and do not conflict: both save passes, and a student with 4 steps or 1 leaves the cache "
            "nothing to skip; the pipeline takes them all the same"
        )
    if set(answer) != {"student", "solver"}:
        raise WrongAnswerError(
            f"the {first.name} and the {second.name} are different factors, and the pipeline takes both"
        )
    _praise("a student learned jumps between its own times; another solver would ask it for steps it never saw")


def ex_12_2(answer: Answer) -> None:
    """predicted_speedup(macs, rate, new_macs, new_rate, overhead_s): from arithmetic, its rates and the overhead."""
    macs, rate, new_macs, new_rate, overhead = 12e9, 4e10, 0.15e9, 6e10, 5e-4
    todo = "time is overhead_s + macs / rate, before and after; return the time before over the time after"
    found = _called(answer, (macs, rate, new_macs, new_rate, overhead), todo)
    if found is None:
        return
    before, after = macs / rate, new_macs / new_rate
    mistakes = (
        (before / after, "the overhead is missing: it is paid before and after, whatever the network costs"),
        (macs / new_macs, "this is the ratio of the MACs alone: the rate changes too, and the overhead stays"),
        ((overhead + after) / (overhead + before), "upside down: a speed-up is the time before over the time after"),
        (before / (overhead + after), "the overhead was there before as well"),
        ((overhead + before) / after, "the overhead is still there after"),
        ((overhead + before) / (overhead + new_macs / rate), "the new pipeline runs its MACs at the new rate"),
        (overhead + before / after, "seconds and a ratio cannot be added: add the overhead to both times"),
    )
    _compare(found, (overhead + before) / (overhead + after), mistakes)
    _praise(f"the arithmetic promised {before / after:.0f} times here, the overhead leaves {found:.0f}")


def ex_12_3(answer: Recipe | EllipsisType | None) -> None:
    """my_recipe: at least 20 times less arithmetic than the teacher, without a student."""
    if _is_stub(answer):
        _not_yet("write a Recipe((...,)) from Solver, TeaCache and DynamicInt8; each guided step is two passes of 100")
        return
    if not isinstance(answer, Recipe):
        raise WrongAnswerError(f"a Recipe is asked for, Recipe((technique, ...)), got {type(answer).__name__}")
    names = [entry["technique"] for entry in answer.to_dict()["techniques"]]
    if "student" in names:
        raise WrongAnswerError("a student is trained for this; the exercise asks how far one gets without training")
    pipe = load("fashion")
    pipe.set_progress_bar_config(disable=True)

    def arithmetic(**settings: int) -> int:
        call = partial(pipe, "bag", generator=torch.Generator().manual_seed(0), output_type="pt", **settings)
        with torch.no_grad():
            return count(call, pipe.transformer).macs

    teacher = pipe.config.default_steps * arithmetic(num_inference_steps=1)
    answer.apply(pipe)
    gain = teacher / arithmetic()
    if gain < 20:
        hint = "fewer steps, or steps that a cache skips"
        if {"dynamic_int8", "modelopt_ptq"} & set(names):
            hint += "; fewer bits make a MAC cheaper and not one MAC fewer"
        raise WrongAnswerError(f"{gain:.1f} times less arithmetic than the teacher, at least 20 are asked: {hint}")
    _praise(f"{gain:.1f} times less arithmetic; add it to LADDER and see what its pictures are worth")
