"""Exercises of lesson 06."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.flow import interpolate
from diffusion_opt.lesson.checks.answers import Answer, WrongAnswerError, called, compare, praise


def ex_06_1(answer: Answer) -> None:
    """slot_gigabytes(layers, tokens, width, bytes_each, contexts, steps): keys and values that streaming keeps."""
    layers, tokens, width, each, contexts, steps = sizes = (5, 7000, 300, 4, 3, 11)
    found = called(answer, sizes)
    if found is None:
        return
    right = 2 * layers * tokens * width * each * contexts * steps / 1e9
    mistakes = (
        (right / 2, "a key and a value: two vectors for each token and layer"),
        (right / contexts, "with two-pass guidance each pass has its own keys and values: one slot for each context"),
        (right / steps, "the next frame needs the slot of each step: keys and values differ from step to step"),
        (right / contexts / steps, "this is one slot: streaming keeps one for each context and step"),
        (right / layers, "each layer has its own keys and values"),
        (right / each, "these are numbers; each of them has `bytes_each` bytes"),
        (right * 1e9, "these are bytes; a gigabyte is 1e9 of them"),
        (right * 1e9 / 2**30, "these are gibibytes, 2^30 bytes; a gigabyte is 1e9"),
        (right * 8, "these are gigabits; a byte has 8 of them"),
    )
    compare(found, right, mistakes)
    praise(
        answer,
        "weights have to be there only once, slots for each step: a student with fewer steps needs fewer of them",
    )


def ex_06_2(answer: Answer) -> None:
    """grow(active, ring): the tokens within `ring` rows and columns of an active one."""
    active = torch.zeros(6, 9, dtype=torch.bool)
    active[0, 8] = active[3, 3] = True
    found = called(answer, (active, 2))
    if found is None:
        return
    mistakes = (
        (active, "nothing has grown: the neighbors of active tokens are missing"),
        (_grown(active, 1), "a ring of 1: grow by `ring` tokens in each direction"),
        (_grown(active, 2) & ~active, "the active tokens themselves are missing"),
        (_grown(active, 2, rows=0), "it has grown along the rows only: columns count as well"),
        (_grown(active, 2, columns=0), "it has grown along the columns only: rows count as well"),
        (_shifted(active, 2), "it wraps around the edges: the last column is no neighbor of the first"),
        (_cross(active, 2, corners=False), "this is a cross: the diagonal neighbors belong to it too"),
        (_cross(active, 2, corners=True), "this is a diamond: the corners of the square belong to it too"),
    )
    compare(found, _grown(active, 2), mistakes)
    if not torch.equal(answer(active, 0).bool(), active):
        raise WrongAnswerError("with ring 0 the active tokens must come back, neither more nor fewer")
    praise(answer, "a ring costs little on a large picture: the edge of a region grows slower than its area")


def _grown(active: Tensor, ring: int, rows: int | None = None, columns: int | None = None) -> Tensor:
    reach = (ring if rows is None else rows, ring if columns is None else columns)
    return F.max_pool2d(active[None].float(), tuple(2 * r + 1 for r in reach), stride=1, padding=reach)[0].bool()


def _shifted(active: Tensor, ring: int) -> Tensor:
    """As by torch.roll, which takes what leaves on one side back in on the other."""
    steps = range(-ring, ring + 1)
    return torch.stack([active.roll((i, j), dims=(0, 1)) for i in steps for j in steps]).any(dim=0)


def _cross(active: Tensor, ring: int, corners: bool) -> Tensor:
    """Rows and columns apart; with `corners` step by step, which makes a diamond."""
    if not corners:
        return _grown(active, ring, rows=0) | _grown(active, ring, columns=0)
    for _ in range(ring):
        active = _cross(active, 1, corners=False)
    return active


def ex_06_3(answer: Answer) -> None:
    """keep_outside(x, clean, noise, region, r): after a step to time r, put back what is known outside the region."""
    generator = torch.Generator().manual_seed(4)
    x, clean, noise = (torch.randn(5, 3, generator=generator) for _ in range(3))
    region, r = torch.tensor([False, True, True, False, True]), 0.3
    try:
        found = called(answer, (x, clean, noise, region, r))
    except RuntimeError as error:
        raise WrongAnswerError(
            f"shapes do not fit ({error}); region has shape (n,), one entry a token: make it (n, 1) first"
        ) from error
    if found is None:
        return
    known, inside = interpolate(clean, noise, torch.full((5,), r)), region[:, None]
    mistakes = (
        (torch.where(inside, known, x), "inside and outside are swapped: x stays where the region is true"),
        (
            torch.where(inside, x, clean),
            "the outside has no noise: at time r the network expects (1 - r) clean + r noise everywhere",
        ),
        (torch.where(inside, x, r * clean + (1 - r) * noise), "r and 1 - r are swapped: time 1 is noise"),
        (known, "the region is overwritten as well: there x has to stay"),
        (x, "nothing was put back outside the region"),
        (torch.where(inside, x, noise), "this is noise alone: at time r only r of it is left"),
    )
    compare(found, torch.where(inside, x, known), mistakes)
    praise(answer, "what is known need not be computed; only its keys and values have to be renewed now and then")
