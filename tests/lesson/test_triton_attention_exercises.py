"""Exercises of lesson 07: each typical mistake gets its hint, and a kernel that does nothing is a stub."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists on Linux only")
tl = pytest.importorskip("triton.language", reason="Triton exists on Linux only")

from diffusion_opt.lesson import checks, solutions  # noqa: E402 - after the skip
from diffusion_opt.lesson.checks import WrongAnswerError  # noqa: E402


@triton.jit
def stub_kernel(X, OUT, columns, BLOCK: tl.constexpr): ...


@triton.jit
def padded_with_zeros(X, OUT, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    x = tl.load(X + place, mask=inside, other=0.0)
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + place, weights / tl.sum(weights, 0), mask=inside)


@triton.jit
def without_sum(X, OUT, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    x = tl.load(X + place, mask=inside, other=float("-inf"))
    tl.store(OUT + place, tl.exp(x - tl.max(x, 0)), mask=inside)


@triton.jit
def without_maximum(X, OUT, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    weights = tl.exp(tl.load(X + place, mask=inside, other=float("-inf")))
    tl.store(OUT + place, weights / tl.sum(weights, 0), mask=inside)


@triton.jit
def rows_a_block_apart(X, OUT, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    x = tl.load(X + place, mask=inside, other=float("-inf"))
    weights = tl.exp(x - tl.max(x))
    tl.store(OUT + place, weights / tl.sum(weights), mask=inside)


@triton.jit
def unmasked_store(X, OUT, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    x = tl.load(X + place, mask=tl.arange(0, BLOCK) < columns, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + place, weights / tl.sum(weights, 0))


def changed(**changes):
    """The right merge with one of its three results replaced."""

    def merge(m1, l1, a1, m2, l2, a2):
        m, total, a = solutions.SOLUTIONS["ex_07_2"](m1, l1, a1, m2, l2, a2)
        given = {"m1": m1, "l1": l1, "a1": a1, "m2": m2, "l2": l2, "a2": a2, "m": m, "l": total, "a": a}
        return tuple(changes[key](given) if key in changes else given[key] for key in ("m", "l", "a"))

    return merge


def intensity(change):
    def count(n, d, block_m, each):
        right = solutions.SOLUTIONS["ex_07_3"](n, d, block_m, each)
        return change(right, n, d, block_m, each)

    return count


MISTAKES = [
    ("ex_07_1", padded_with_zeros, "counts as a score of 0"),
    ("ex_07_1", without_sum, "the division by the sum"),
    ("ex_07_1", without_maximum, "large ones overflow"),
    ("ex_07_1", unmasked_store, "writes behind the data"),
    ("ex_07_1", rows_a_block_apart, "not after BLOCK"),
    ("ex_07_1", torch.softmax, "decorated with @triton.jit"),
    ("ex_07_2", changed(m=lambda g: g["m1"] + g["m2"]), "maxima do not add"),
    ("ex_07_2", changed(l=lambda g: g["l1"] + g["l2"]), "under its own maximum"),
    ("ex_07_2", changed(a=lambda g: g["a1"] + g["a2"]), "shrink like the sums"),
    ("ex_07_2", changed(a=lambda g: g["a"] / g["l"][:, None]), "not divided yet"),
    ("ex_07_2", lambda *parts: parts[0], "three results"),
    ("ex_07_3", intensity(lambda right, n, d, block_m, each: right * each), "FLOP per number"),
    ("ex_07_3", intensity(lambda right, n, d, block_m, each: n / each), "once for each tile of queries"),
    ("ex_07_3", intensity(lambda right, *_: right / 2), "two products"),
]


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_a_kernel_that_stores_nothing_is_a_stub(capsys):
    checks.ex_07_1(stub_kernel)
    assert capsys.readouterr().out == "not yet\n"
