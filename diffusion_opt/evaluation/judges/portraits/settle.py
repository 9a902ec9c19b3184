"""Where the reader is unsure, exact renders decide: a reading proposes, a comparison with pictures settles.

A portrait differs from another in one attribute only at a few pixels, and every portrait has an exact picture. So for
each attribute whose best value has a probability below `SURE`, the two most likely values are drawn, everything else as
read, and the one whose render is nearer to the picture (mean square difference) stands. Pixels in which the two renders
agree count the same for both, so what else is wrong with a picture has no say.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.datasets.portraits import ATTRIBUTES, Portrait, draw_many
from diffusion_opt.evaluation.judges.portraits.likeness import own_distance
from diffusion_opt.evaluation.judges.portraits.reader import VALUES, Reading, allowed_values

SURE = 0.98


def settled(
    pictures: Float[Tensor, "n 3 128 128"], reading: Reading, styles: list[str | None] | None = None
) -> list[Portrait]:
    """The portraits of a reading of these pictures, unsure attributes settled by renders: two for each.

    Raises ValueError for another number of pictures or styles than the reading has.
    """
    first = reading.portraits(styles)
    if len(first) != len(pictures):
        raise ValueError(f"the reading is of {len(first)} pictures, got {len(pictures)}")
    out = []
    for row, portrait in enumerate(first):
        logits = {name: values[row] for name, values in reading.logits.items()}
        out.append(_settle(pictures[row], portrait, logits))
    return out


def _settle(picture: Float[Tensor, "3 h w"], portrait: Portrait, logits: dict[str, Float[Tensor, " v"]]) -> Portrait:
    likely = {name: _two_likeliest(portrait.style, name, logits[name]) for name in ATTRIBUTES[portrait.style]}
    values = {name: choices[0] for name, (choices, _) in likely.items()}
    for name, (choices, sure) in likely.items():
        if sure >= SURE or (name == "hair_color" and values["hair"] == "bald"):
            continue
        candidates = [_portrait(portrait.style, values | {name: value}) for value in choices]
        distances = own_distance(picture.expand(len(candidates), -1, -1, -1), draw_many(candidates, progress=False))
        values[name] = choices[int(distances.argmin())]
    return _portrait(portrait.style, values)


def _two_likeliest(style: str, name: str, logits: Float[Tensor, " v"]) -> tuple[tuple[str, ...], float]:
    """The two likeliest values that a style has, and the probability of the first."""
    chances = logits.masked_fill(~allowed_values(style, name), -torch.inf).softmax(0)
    found = chances.topk(2)
    return tuple(VALUES[name][index] for index in found.indices.tolist()), found.values[0].item()


def _portrait(style: str, values: dict[str, str]) -> Portrait:
    return Portrait(style, **{k: v for k, v in values.items() if k != "hair_color" or values["hair"] != "bald"})
