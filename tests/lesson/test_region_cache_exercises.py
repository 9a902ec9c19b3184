"""Exercises of lesson 06: each typical mistake gets its hint, and other right answers than the solution's pass."""

import pytest
import torch
from torch.nn import functional as F

from diffusion_opt.caching.region import MODEL_SIZES, slot_bytes
from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.solutions.region_cache import slot_gigabytes


def slots(*, keys=2, unit=1e9, bits=1, without=()):
    """A wrong `slot_gigabytes`: a factor that was left out, or another unit."""

    def answer(layers, tokens, width, bytes_each, contexts, steps):
        factors = {"layers": layers, "each": bytes_each, "contexts": contexts, "steps": steps}
        product = keys * tokens * width * bits / unit
        for name, factor in factors.items():
            product *= 1 if name in without else factor
        return product

    return answer


def pooled(rows, columns):
    def answer(active, ring):
        size, reach = (2 * rows * ring + 1, 2 * columns * ring + 1), (rows * ring, columns * ring)
        return F.max_pool2d(active[None].float(), size, stride=1, padding=reach)[0].bool()

    return answer


def rolled(active, ring):
    steps = range(-ring, ring + 1)
    return torch.stack([active.roll((i, j), (0, 1)) for i in steps for j in steps]).any(0)


def diamond(active, ring):
    rows, columns = (torch.arange(size) for size in active.shape)
    near = torch.zeros_like(active)
    for row, column in active.nonzero().tolist():
        near |= (rows[:, None] - row).abs() + (columns - column).abs() <= ring
    return near


def one_too_many(active, ring):
    return pooled(1, 1)(active, max(ring, 1))


MISTAKES = [
    ("ex_06_1", slots(keys=1), "a key and a value"),
    ("ex_06_1", slots(without=("contexts",)), "one slot for each context"),
    ("ex_06_1", slots(without=("steps",)), "differ from step to step"),
    ("ex_06_1", slots(without=("contexts", "steps")), "this is one slot"),
    ("ex_06_1", slots(without=("layers",)), "each layer"),
    ("ex_06_1", slots(without=("each",)), "these are numbers"),
    ("ex_06_1", slots(unit=1), "these are bytes"),
    ("ex_06_1", slots(unit=2**30), "gibibytes"),
    ("ex_06_1", slots(bits=8), "gigabits"),
    ("ex_06_1", lambda *_: 6.3, r"got 6\.3"),
    ("ex_06_2", lambda active, ring: active, "nothing has grown"),
    ("ex_06_2", lambda active, ring: pooled(1, 1)(active, 1), "a ring of 1"),
    ("ex_06_2", lambda active, ring: pooled(1, 1)(active, ring) & ~active, "themselves are missing"),
    ("ex_06_2", pooled(0, 1), "along the rows only"),
    ("ex_06_2", pooled(1, 0), "along the columns only"),
    ("ex_06_2", rolled, "wraps around"),
    ("ex_06_2", lambda active, ring: pooled(0, 1)(active, ring) | pooled(1, 0)(active, ring), "a cross"),
    ("ex_06_2", diamond, "a diamond"),
    ("ex_06_2", one_too_many, "with ring 0"),
    ("ex_06_2", lambda active, ring: active.flatten(), "the shape must be"),
    ("ex_06_3", lambda x, c, e, region, r: torch.where(region[:, None], (1 - r) * c + r * e, x), "swapped: x stays"),
    ("ex_06_3", lambda x, c, e, region, r: torch.where(region[:, None], x, c), "has no noise"),
    ("ex_06_3", lambda x, c, e, region, r: torch.where(region[:, None], x, r * c + (1 - r) * e), "time 1 is noise"),
    ("ex_06_3", lambda x, c, e, region, r: (1 - r) * c + r * e, "overwritten"),
    ("ex_06_3", lambda x, c, e, region, r: x, "nothing was put back"),
    ("ex_06_3", lambda x, c, e, region, r: torch.where(region[:, None], x, e), "noise alone"),
    ("ex_06_3", lambda x, c, e, region, r: torch.where(region, x, (1 - r) * c + r * e), r"make it \(n, 1\)"),
    ("ex_06_3", lambda x, c, e, region, r: 0 * x, "off by up to"),
]


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_growing_token_by_token_passes_too(capsys):
    def answer(active, ring):
        rows, columns = (torch.arange(size) for size in active.shape)
        near = torch.zeros_like(active)
        for row, column in active.nonzero().tolist():
            near |= ((rows - row).abs() <= ring)[:, None] & ((columns - column).abs() <= ring)
        return near

    checks.ex_06_2(answer)
    assert capsys.readouterr().out.startswith("correct: ")


def test_the_solution_agrees_with_the_planner_up_to_what_is_kept_of_inputs_and_velocities():
    size = MODEL_SIZES["FLUX.2-dev 1024x1024"]
    tokens = size.num_tokens + size.num_text
    by_hand = slot_gigabytes(len(size.layers), tokens, 48 * 128, size.native_bytes, contexts=2, steps=4)
    assert by_hand == pytest.approx(slot_bytes(size, contexts=2, steps=4) / 1e9, rel=1e-3)
