"""Exercises of lesson 07."""

import torch
from torch import Tensor

from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, is_stub, not_yet, praise


def ex_07_1(answer: object) -> None:
    """softmax_kernel(X, OUT, columns, BLOCK): a Triton kernel, one program a row."""
    if is_stub(answer):
        not_yet()
        return
    from triton import JITFunction

    if not isinstance(answer, JITFunction):
        raise WrongAnswerError(
            f"hand over the function itself, decorated with @triton.jit; got {type(answer).__name__}"
        )
    x = torch.randn(5, 11, generator=torch.Generator().manual_seed(1)) - 4
    out, behind = _softmax_of(answer, x)
    if out.isnan().all():
        not_yet()
        return
    if not behind.isnan().all():
        if out.isnan().any():
            raise WrongAnswerError("a row begins after the `columns` numbers of the row before it, not after BLOCK")
        raise WrongAnswerError("the kernel writes behind the data: the store needs its mask as well")
    counted = (x - x.amax(1, keepdim=True).clamp(min=0)).exp()  # with zeros in the place of what does not exist
    padded = "what does not exist counts as a score of 0: load it as -inf"
    absent = 5 * (-x.amax(1, keepdim=True).clamp(min=0)).exp()
    mistakes = (
        (
            counted / (counted.sum(1, keepdim=True) + absent),
            "what does not exist counts as a score of 0: load it as -inf",
        ),
        (x.exp() / (x.exp().sum(1, keepdim=True) + 5), padded),
        ((x - x.amax(1, keepdim=True)).exp(), "the division by the sum of the row is missing"),
        (x.exp(), "the division by the sum of the row is missing"),
    )
    compare(out, x.softmax(1), mistakes)
    out, _ = _softmax_of(answer, 200 * x)
    if not torch.allclose(out, (200 * x).softmax(1), atol=1e-6):
        raise WrongAnswerError("right for small scores, but large ones overflow: subtract the maximum of the row first")
    praise(answer, "a masked load decides what absent elements mean: 0 for a sum, -inf for a softmax")


def _softmax_of(kernel: object, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a softmax kernel makes of x (rows, columns), and what it leaves in the memory behind, NaN if untouched."""
    from diffusion_opt.kernels.runtime import interpreted, run

    block = 16
    memory = torch.full((block * (len(x) + 1),), torch.nan)  # enough for rows that begin `block` numbers apart
    source = torch.zeros_like(memory)
    source[: x.numel()] = x.flatten()
    with interpreted():
        run(kernel, (len(x),), source, memory, x.shape[1], BLOCK=block)
    return memory[: x.numel()].reshape(x.shape), memory[x.numel() :]


def ex_07_2(answer: Answer) -> None:
    """merge(m1, l1, a1, m2, l2, a2): the softmax state of the union of two parts."""
    generator = torch.Generator().manual_seed(2)
    scores, values = torch.randn(3, 9, generator=generator) * 3, torch.randn(9, 4, generator=generator)
    parts = [_state(scores[:, part], values[part]) for part in (slice(0, 2), slice(2, 9))]
    found = called(answer, (*parts[0], *parts[1]))
    if found is None:
        return
    if not isinstance(found, tuple) or len(found) != 3:
        raise WrongAnswerError(f"three results are asked for, m, l and a; got {type(found).__name__}")
    expected = _state(scores, values)
    (m1, l1, a1), (m2, l2, a2) = parts
    m = torch.maximum(m1, m2)
    grown = [(m - each).exp() for each in (m1, m2)]
    compare(found[0], m, ((m1 + m2, "maxima do not add: the maximum of the union is the larger one"),))
    compare(
        found[1],
        expected[1],
        (
            (l1 + l2, "each sum was taken under its own maximum: shrink it by exp(old - new) before adding"),
            (l1 * grown[0] + l2 * grown[1], "the sign: a sum under a smaller maximum must shrink, exp(old - new)"),
        ),
    )
    compare(
        found[2],
        expected[2],
        (
            (a1 + a2, "the weighted values shrink like the sums"),
            (expected[2] / expected[1][:, None], "not divided yet: the division by l comes once, at the very end"),
        ),
    )
    praise(answer, "the order of the parts does not matter, so a long row can be shared by many programs")


def _state(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = scores.amax(1)
    weights = (scores - m[:, None]).exp()
    return m, weights.sum(1), weights @ values


def ex_07_3(answer: Answer) -> None:
    """attention_intensity(n, d, block_m, each): FLOP per byte moved by the attention kernel."""
    n, d, block_m, each = 768, 40, 64, 2
    found = called(answer, (n, d, block_m, each))
    if found is None:
        return
    flops, once, keys = 4 * n * n * d, 2 * n * d, 2 * n * d * (n // block_m)
    mistakes = (
        (flops / (once + keys), "this is FLOP per number; a number has `each` bytes"),
        (flops / (each * 4 * n * d), "keys and values are read once for each tile of queries, n / block_m times"),
        (flops / (each * keys), "the queries are read and the result is written, once each"),
        (flops / (each * (once + keys / 2)), "keys and values: two matrices are read"),
        (flops / 2 / (each * (once + keys)), "there are two products: scores, and weights with values"),
    )
    compare(found, flops / (each * (once + keys)), mistakes)
    praise(
        answer,
        f"{found:.0f} FLOP per byte, and nearly block_m for long rows: the tile of queries sets it, not the length",
    )
