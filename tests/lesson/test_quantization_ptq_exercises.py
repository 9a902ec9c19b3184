"""Exercises of lesson 03: each typical mistake gets its hint, and the solutions are what the package computes."""

import pytest
import torch

from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.solutions.quantization_ptq import bits_per_weight, int_channels, smooth
from diffusion_opt.quantization import FORMATS
from diffusion_opt.quantization.arithmetic.int8 import int8


def on_grid(largest, top=lambda bits: 2 ** (bits - 1) - 1, rounding=torch.round):
    """A wrong `int_channels`: another scale, another top or another rounding."""

    def answer(weight, bits):
        s = top(bits) / largest(weight)
        return rounding(weight * s) / s

    return answer


def rows(weight):
    return weight.abs().amax(1, keepdim=True)


def codes(weight, bits):
    return (weight * (2 ** (bits - 1) - 1) / rows(weight)).round()


def four_bits_only(weight, bits):
    return int_channels(weight, 4)


def cost(codes=1.0, scales=1.0, branch=1.0, factor=1.0):
    """A wrong `bits_per_weight`: parts left out or counted wrongly."""

    def answer(rows, columns, bits, block, scale_bits, rank):
        both = 16 * rank * (rows + columns) / (rows * columns)
        return factor * (codes * bits + scales * scale_bits / block + branch * both)

    return answer


def smoothed(scale):
    """A wrong `smooth` whose product is right: another s."""

    def answer(weight, x, alpha):
        s = scale(weight, x, alpha)
        return weight * s, x / s

    return answer


def sizes(weight, x):
    return weight.abs().amax(0), x.abs().amax(0)


def both_divided(weight, x, alpha):
    new, moved = smooth(weight, x, alpha)
    return weight**2 / new, moved


def in_place(weight, x, alpha):
    new, moved = smooth(weight, x, alpha)
    x /= x / moved
    return new, x


def by_row(weight, x, alpha):
    new, moved = smooth(weight, x, alpha)
    return new * torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), moved


MISTAKES = [
    ("ex_03_1", lambda weight, bits: weight, "nothing is rounded"),
    ("ex_03_1", on_grid(lambda weight: weight.abs().max()), "one scale for the whole matrix"),
    ("ex_03_1", on_grid(lambda weight: weight.abs().amax(0, keepdim=True)), "look along axis 1"),
    ("ex_03_1", on_grid(rows, lambda bits: 2 ** (bits - 1)), "one below it"),
    ("ex_03_1", on_grid(rows, lambda bits: 2**bits - 1), "half of the codes"),
    ("ex_03_1", on_grid(rows, rounding=torch.trunc), "round to the nearest"),
    ("ex_03_1", on_grid(lambda weight: weight.amax(1, keepdim=True)), r"largest \*size\*"),
    ("ex_03_1", codes, "these are the integers"),
    ("ex_03_1", four_bits_only, "off by up to"),
    ("ex_03_1", lambda weight, bits: int_channels(weight, bits)[:1], "shape must be"),
    ("ex_03_2", cost(scales=0, branch=0), "codes alone"),
    ("ex_03_2", cost(branch=0), "branch is missing"),
    ("ex_03_2", cost(scales=0), "scales are missing"),
    ("ex_03_2", cost(branch=1 / 16), "has 16 bits"),
    ("ex_03_2", cost(scales=16), "share a scale"),
    ("ex_03_2", cost(factor=384 * 256), "divide by the number of weights"),
    ("ex_03_2", cost(factor=1 / 8), "in bytes"),
    ("ex_03_2", cost(branch=384 / (384 + 256)), "two factors"),
    ("ex_03_2", cost(branch=256 / (384 + 256)), "two factors"),
    ("ex_03_2", cost(branch=384 * 256 / (384 + 256)), "never stored as a matrix"),
    ("ex_03_2", lambda *_: 17.0, "got 17"),
    ("ex_03_2", lambda *_: bits_per_weight(384, 256, 4, 16, 8, 6), "expected 8.25"),
    ("ex_03_3", smoothed(lambda w, x, a: sizes(w, x)[1] ** (1 - a) / sizes(w, x)[0] ** a), "alpha belongs to"),
    ("ex_03_3", smoothed(lambda w, x, a: sizes(w, x)[1] ** a), "weight's sizes are missing"),
    ("ex_03_3", smoothed(lambda w, x, a: sizes(w, x)[1]), "moves everything"),
    ("ex_03_3", smoothed(lambda w, x, a: sizes(w, x)[0] ** (a - 1)), "inputs' sizes are missing"),
    ("ex_03_3", smoothed(lambda w, x, a: (sizes(w, x)[1] / sizes(w, x)[0]) ** a), "exponent"),
    ("ex_03_3", smoothed(lambda w, x, a: x.abs().mean(0) ** a / w.abs().mean(0) ** (1 - a)), "not the mean"),
    ("ex_03_3", smoothed(lambda w, x, a: x.amax(0) ** a / w.amax(0) ** (1 - a)), r"largest \*size\*"),
    ("ex_03_3", smoothed(lambda w, x, a: torch.ones(7)), "nothing has moved"),
    ("ex_03_3", both_divided, "multiplied with"),
    ("ex_03_3", by_row, "multiplied with"),
    ("ex_03_3", in_place, "make new ones"),
    ("ex_03_3", lambda weight, x, alpha: smooth(weight, x, alpha)[::-1], "weight comes first"),
    ("ex_03_3", lambda weight, x, alpha: (weight[:, :1], x), "must keep the shape"),
    ("ex_03_3", lambda weight, x, alpha: x, "two tensors"),
]


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_of_rows_are_those_of_the_package(bits):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(int_channels(weight, bits), int8(weight, rows(weight), bits))


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_cost_is_that_of_the_format_up_to_what_does_not_grow_with_the_layer(rank):
    rows, columns = 384, 256
    whole = FORMATS["nvfp4_svdquant"].with_rank(rank).weight_bits(rows, columns)
    smoothing_and_tensor_scale = 32 * columns + 32
    ours = bits_per_weight(rows, columns, 4, 16, 8, rank) * rows * columns
    assert whole - smoothing_and_tensor_scale == pytest.approx(ours)


def test_smoothing_keeps_the_product_and_evens_out_the_inputs():
    generator = torch.Generator().manual_seed(5)
    weight, x = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (5, 11))
    x[:, 2] *= 50
    new, moved = smooth(weight, x, 0.5)
    torch.testing.assert_close(moved @ new.T, x @ weight.T)
    spread = [float(one.abs().amax(0).max() / one.abs().amax(0).median()) for one in (x, moved)]
    assert spread[1] < 0.3 * spread[0]
    torch.testing.assert_close(moved.abs().amax(0), new.abs().amax(0))  # alpha = 1/2 makes both equally large
