"""Exercises of lesson 08."""

import torch

from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


def ex_08_1(answer: Answer) -> None:
    """smooth(q, k, scale): keys without their mean, and what each query's scores lost with it."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 3, 5, 7, generator=generator), torch.randn(2, 3, 11, 7, generator=generator) + 1
    given, scale = k.clone(), 0.4
    found = called(answer, (q, given, scale))
    if found is None:
        return
    if not torch.equal(given, k):
        raise WrongAnswerError("k itself has changed: `k -= mean` writes into the caller's tensor; make a new one")
    if not isinstance(found, tuple) or len(found) != 2:
        raise WrongAnswerError(f"two results are asked for, the keys and the share; got {type(found).__name__}")
    mean = k.mean(2, keepdim=True)
    together = "softmax does not see it, but each batch entry and head has a mean of its own: average over tokens only"
    compare(
        found[0],
        k - mean,
        (
            (k - k.mean(-1, keepdim=True), "a mean over channels differs from key to key, and softmax sees that"),
            (k - k.mean(), together),
            (k - k.mean((0, 1, 2)), together),
            (k - k.mean((0, 2), keepdim=True), together),
            (k - k.mean((1, 2), keepdim=True), together),
            (k, "the keys have not changed"),
            (k + mean, "the sign: the mean comes off"),
        ),
    )
    share = scale * (q @ mean.mT).squeeze(-1)
    compare(
        found[1],
        share,
        (
            (-share, "the sign: what the scores lost has to be added to the LSE"),
            (share / scale, "scores are scale q . k, and so is what they lost"),
        ),
    )
    praise(
        answer,
        "softmax ignores what all keys have in common; the log-sum-exp does not, and is put right with the share",
    )


def ex_08_2(answer: Answer) -> None:
    """score_gradient(p, rounded, values, grad_out): the gradient that reaches the scores."""
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(5, 7, generator=generator).softmax(-1)
    rounded = (p * 8).round() / 8
    values, grad_out = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator)
    found = called(answer, (p, rounded, values, grad_out))
    if found is None:
        return
    grad_p = grad_out @ values.mT

    def by(weights: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return weights * (grad_p - delta)

    exact, shortcut = ((w * grad_p).sum(-1, keepdim=True) for w in (p, rounded))
    mistakes = (
        (by(p, shortcut), "this delta is dO . O, and O is made of rounded weights: the sum needs p"),
        (by(rounded, shortcut), "softmax was taken before the rounding: its gradient needs p, not the rounded weights"),
        (by(rounded, exact), "softmax was taken before the rounding: its gradient needs p in front of the bracket too"),
        (by(p, torch.zeros(5, 1)), "the gradient of softmax is missing its second part, the sum over the row"),
        (grad_p, "this is the gradient of the weights; softmax is still to come"),
        (by(p, (p * grad_p).sum(0, keepdim=True)), "softmax runs along the keys, so the sum does: over the last axis"),
    )
    compare(found, by(p, exact), mistakes)
    praise(answer, "a kernel must keep P V beside Pq V: delta comes from the one, the output from the other")


def ex_08_3(answer: Answer) -> None:
    """window_table(tiles, width): which tiles each tile of a row of tiles attends to."""
    tiles = 9
    found = called(answer, (tiles, 4))
    if found is None:
        return
    if isinstance(found, torch.Tensor) and found.dtype != torch.bool:
        raise WrongAnswerError(f"the table holds True and False; got {found.dtype}")
    place = torch.arange(tiles)
    begin = (place - 2)[:, None]
    wrapped = ((place - begin) % tiles) < 4
    mistakes = (
        (_inside(place, begin, 4), "at the border the window is cut off: move it inside, so that all rows cost alike"),
        (_inside(place, begin, 5), "the window is one tile too wide: it ends before begin + width"),
        (wrapped, "it wraps around: the last tile is no neighbor of the first"),
        (_inside(place, begin - 2, 9), "this reaches `width` to either side; the window has `width` tiles in all"),
        (_inside(place, begin - 1, 4), "this window ends at the tile itself; it should lie around it"),
        (_moved(tiles, 4).mT, "a row is what one tile of queries attends to; this is the transpose"),
    )
    for wanted, table, hints in ((4, found, mistakes), (3, answer(tiles, 3), ())):
        compare(_numbers(table), _numbers(_moved(tiles, wanted)), [(_numbers(wrong), hint) for wrong, hint in hints])
    if not torch.equal(answer(5, 12), torch.ones(5, 5, dtype=torch.bool)):
        raise WrongAnswerError("a window wider than the row is the whole row: begin at 0 then, not before it")
    praise(answer, "every row has `width` tiles, so the density is width / tiles, and no program waits for another")


def _numbers(table: object) -> object:
    return table.int() if isinstance(table, torch.Tensor) else table


def _inside(place: torch.Tensor, begin: torch.Tensor, width: int) -> torch.Tensor:
    return (place >= begin) & (place < begin + width)


def _moved(tiles: int, width: int) -> torch.Tensor:
    place = torch.arange(tiles)
    return _inside(place, (place - width // 2).clamp(0, max(0, tiles - width))[:, None], width)
