"""Exercises of lesson 08: each typical mistake gets its hint, and the solutions are what the kernels room computes."""

import pytest
import torch

from diffusion_opt.kernels.attention.sparse import sliding_tile, token_tiles
from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.solutions.low_precision_attention import score_gradient, smooth, window_table


def smoothed(axes, factor=1.0, sign=-1.0):
    """A wrong `smooth`: another mean, share or sign."""

    def answer(q, k, scale):
        return k + sign * k.mean(axes, keepdim=True), factor * smooth(q, k, scale)[1]

    return answer


def in_place(q, k, scale):
    result = smooth(q, k, scale)
    k -= k.mean(2, keepdim=True)
    return result


def gradient(weights, in_sum, axis=-1):
    """A wrong `score_gradient`: which weights stand before the bracket and in the sum."""

    def answer(p, rounded, values, grad_out):
        choice = {"p": p, "rounded": rounded, "none": 0 * p}
        grad_p = grad_out @ values.mT
        return choice[weights] * (grad_p - (choice[in_sum] * grad_p).sum(axis, keepdim=True))

    return answer


def window(shift=0, wider=0, doubled=False):
    """A wrong `window_table`: not moved inside at the borders, and more."""

    def answer(tiles, width):
        place = torch.arange(tiles)
        begin = (place - (width if doubled else width // 2) - shift)[:, None]
        return (place >= begin) & (place < begin + (2 * width + 1 if doubled else width + wider))

    return answer


def wrapped(tiles, width):
    place = torch.arange(tiles)
    return (place - (place - width // 2)[:, None]) % tiles < width


def begins_outside(tiles, width):
    place = torch.arange(tiles)
    begin = torch.minimum((place - width // 2).clamp(min=0), torch.tensor(tiles - width))[:, None]
    return (place >= begin) & (place < begin + width - 3 * (width > tiles))


MISTAKES = [
    ("ex_08_1", smoothed((-1,)), "over channels"),
    ("ex_08_1", smoothed((0, 1, 2)), "average over tokens only"),
    ("ex_08_1", smoothed((0, 2)), "average over tokens only"),
    ("ex_08_1", smoothed((1, 2)), "average over tokens only"),
    ("ex_08_1", smoothed((0, 1, 2, 3)), "average over tokens only"),
    ("ex_08_1", smoothed((2,), sign=0.0), "have not changed"),
    ("ex_08_1", smoothed((2,), sign=1.0), "the mean comes off"),
    ("ex_08_1", smoothed((2,), factor=-1.0), "added to the LSE"),
    ("ex_08_1", smoothed((2,), factor=2.5), "so is what they lost"),
    ("ex_08_1", in_place, "caller's tensor"),
    ("ex_08_1", lambda q, k, scale: k - k.mean(2, keepdim=True), "two results"),
    ("ex_08_2", gradient("p", "rounded"), r"this delta is dO \. O"),
    ("ex_08_2", gradient("rounded", "rounded"), "before the rounding"),
    ("ex_08_2", gradient("rounded", "p"), "in front of the bracket"),
    ("ex_08_2", gradient("p", "none"), "second part"),
    ("ex_08_2", gradient("p", "p", axis=0), "over the last axis"),
    ("ex_08_2", lambda p, rounded, values, grad_out: grad_out @ values.mT, "softmax is still to come"),
    ("ex_08_3", window(), "cut off"),
    ("ex_08_3", window(wider=1), "too wide"),
    ("ex_08_3", window(doubled=True), "to either side"),
    ("ex_08_3", window(shift=1), "ends at the tile itself"),
    ("ex_08_3", wrapped, "wraps around"),
    ("ex_08_3", lambda tiles, width: window_table(tiles, width).mT, "transpose"),
    ("ex_08_3", lambda tiles, width: window_table(tiles, 4), "off by up to"),
    ("ex_08_3", begins_outside, "the whole row"),
    ("ex_08_3", lambda tiles, width: window_table(tiles, width).float(), "True and False"),
]


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_smoothing_changes_the_lse_by_the_share_and_the_weights_not_at_all():
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 3, n, 7, generator=generator, dtype=torch.float64) for n in (5, 11))
    keys, share = smooth(q, k, 0.4)
    before, after = 0.4 * q @ k.mT, 0.4 * q @ keys.mT
    torch.testing.assert_close(after.softmax(-1), before.softmax(-1))
    torch.testing.assert_close(after.logsumexp(-1) + share, before.logsumexp(-1))


def test_the_gradient_is_that_of_autograd_with_the_rounding_straight_through():
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    values, grad_out = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 5))
    p = scores.softmax(-1)
    rounded = (p * 8).round() / 8
    out = (p + (rounded - p).detach()) @ values
    (expected,) = torch.autograd.grad(out, scores, grad_out)
    torch.testing.assert_close(score_gradient(p.detach(), rounded.detach(), values, grad_out), expected)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 9])
def test_the_window_is_the_one_of_sliding_tile_attention(width):
    tiles = token_tiles((1, 1, 6 * 16), (1, 1, 16))
    assert torch.equal(window_table(6, width), sliding_tile(tiles, (1, 1, width)).dense()[0, 0])
