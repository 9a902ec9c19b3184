"""Exercises of lesson 03."""

import torch
from torch import Tensor

from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


def ex_03_1(answer: Answer) -> None:
    """int_channels(weight, bits): symmetric integers with a scale for each row, as the numbers they stand for."""
    weight, bits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), 4
    weight[2] *= 10
    weight[:, 3] *= 3
    found = called(answer, (weight.clone(), bits))
    if found is None:
        return
    rows, columns, whole = (weight.abs().amax(axes, keepdim=True) for axes in (1, 0, (0, 1)))
    top = 2 ** (bits - 1) - 1
    mistakes = (
        (weight, "these are the weights as they were: nothing is rounded yet"),
        (_rounded(weight, whole, top), "this is one scale for the whole matrix; each row has its own"),
        (_rounded(weight, columns, top), "these are scales of columns: a row is an output, so look along axis 1"),
        (_rounded(weight, rows, top + 1), "with 2^(bits - 1) the largest number has no code: codes end one below it"),
        (
            _rounded(weight, rows, 2**bits - 1),
            "half of the codes are negative: the top one is 2^(bits - 1) - 1",
        ),
        (_rounded(weight, rows, top) * top / rows, "these are the integers; divide by s, so they stand for weights"),
        ((weight * top / rows).trunc() * rows / top, "int() and trunc() cut off; round to the nearest"),
        (_rounded(weight, _signed(weight), top), "the largest *size* in a row: a negative number can be it"),
    )
    compare(found, _rounded(weight, rows, top), mistakes)
    for other in (2, 8):
        compare(answer(weight.clone(), other), _rounded(weight, rows, 2 ** (other - 1) - 1), ())
    praise(
        answer, "the scale of a row can be taken out of the sum over columns, so it costs one multiplication per output"
    )


def ex_03_2(answer: Answer) -> None:
    """bits_per_weight(rows, columns, bits, block, scale_bits, rank): with scales of blocks and a branch in 16 bits."""
    rows, columns, bits, block, scale_bits, rank = 384, 256, 4, 16, 8, 6
    found = called(answer, (rows, columns, bits, block, scale_bits, rank))
    if found is None:
        return
    scales = scale_bits / block
    branch = 16 * rank * (rows + columns) / (rows * columns)
    mistakes = (
        (bits, "these are the codes alone: their scales and the branch have to be stored too"),
        (bits + scales, "the branch is missing: B is rows x rank and A is rank x columns, 16 bits per number"),
        (bits + branch, f"the scales are missing: one of {scale_bits} bits for each {block} weights"),
        (bits + scales + branch / 16, "a number of the branch has 16 bits"),
        (bits + scales + 16 * rank / rows, "the branch has two factors: B is rows x rank and A is rank x columns"),
        (bits + scales + 16 * rank / columns, "the branch has two factors: B is rows x rank and A is rank x columns"),
        (bits + scales + 16 * rank, "B A is never stored as a matrix: only its factors, rank x (rows + columns)"),
        (bits + scale_bits + branch, f"{block} weights share a scale"),
        ((bits + scales + branch) * rows * columns, "this is the size of the layer; divide by the number of weights"),
        ((bits + scales + branch) / 8, "this is in bytes; bits are asked for"),
    )
    compare(found, bits + scales + branch, mistakes)
    compare(answer(64, 128, 8, 32, 8, 0), 8.25, ())
    praise(
        answer, "the branch weighs rank / width: 32 columns are little beside a width of thousands, and much beside 256"
    )


def ex_03_3(answer: Answer) -> None:
    """smooth(weight, x, alpha): a new weight and new inputs with the same product, outliers moved from one to other."""
    generator = torch.Generator().manual_seed(3)
    weight, x, alpha = torch.randn(5, 7, generator=generator), torch.randn(11, 7, generator=generator), 0.3
    x[:, 4] *= 20
    given = (weight.clone(), x.clone())
    found = called(answer, (*given, alpha))
    if found is None:
        return
    if not (torch.equal(given[0], weight) and torch.equal(given[1], x)):
        raise WrongAnswerError("the arguments have changed: `x /= s` writes into the caller's tensor; make new ones")
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(one, Tensor) for one in found):
        raise WrongAnswerError(f"two tensors are asked for, the weight and the inputs; got {type(found).__name__}")
    _same_product(weight, x, *found)
    sizes = x.abs().amax(0), weight.abs().amax(0)
    mistakes = (
        (_moved(x, *sizes, 1 - alpha), "alpha belongs to the inputs, 1 - alpha to the weights: 1 would move all of it"),
        (x / sizes[0] ** alpha, "the weight's sizes are missing: what is large there already should not grow more"),
        (x / sizes[0], "this moves everything, as alpha = 1 would: the weights get all of the outliers"),
        (x * sizes[1] ** (1 - alpha), "the inputs' sizes are missing: it is their outliers that are to move"),
        (x, "nothing has moved"),
        (x / (sizes[0] / sizes[1]) ** alpha, "the exponent of the weight's size is 1 - alpha"),
        (
            _moved(x, x.amax(0), weight.amax(0), alpha),
            "the largest *size* of a channel: a negative number can be it",
        ),
        (_moved(x, x.abs().mean(0), weight.abs().mean(0), alpha), "the largest size of a channel, not the mean"),
    )
    compare(found[1], _moved(x, *sizes, alpha), mistakes)
    praise(
        answer, "s becomes part of the weight and of the norm before it, so smoothing costs nothing when the model runs"
    )


def _rounded(weight: Tensor, largest: Tensor, top: int) -> Tensor:
    return (weight / largest * top).round() * largest / top


def _signed(weight: Tensor) -> Tensor:
    return weight.amax(1, keepdim=True)


def _moved(x: Tensor, of_x: Tensor, of_weight: Tensor, alpha: float) -> Tensor:
    return x * of_weight ** (1 - alpha) / of_x**alpha


def _same_product(weight: Tensor, x: Tensor, new_weight: Tensor, new_x: Tensor) -> None:
    """Raise unless both have their shape and the layer still computes the same."""
    if new_weight.shape != weight.shape and new_weight.shape == x.shape:
        raise WrongAnswerError("the weight comes first, then the inputs")
    for name, new, old in (("weight", new_weight, weight), ("inputs", new_x, x)):
        if new.shape != old.shape:
            raise WrongAnswerError(f"the {name} must keep the shape {tuple(old.shape)}, got {tuple(new.shape)}")
    product, before = new_x @ new_weight.T, x @ weight.T
    if torch.allclose(product, before, rtol=1e-4, atol=1e-3):
        return
    if torch.allclose(new_x * (new_weight / weight).mean(0), x, rtol=1e-4, atol=1e-4):
        raise WrongAnswerError("s must be one number for each input channel, the same for all rows of the weight")
    off = float((product - before).abs().max())
    raise WrongAnswerError(
        f"x weight^T has changed by up to {off:.2g}: what the inputs are divided by, the weight is multiplied with"
    )
