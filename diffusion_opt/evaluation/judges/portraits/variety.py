"""Is what a prompt leaves open as varied as it should be? Exactly countable, because portraits are uniform.

A prompt that names a style and some attributes leaves the others to the model. In the training data each of those is
uniform over the values that its style is trained with (`allowed`), with one exception that is exact as well: hair is
never bald where a hair color is named, and there is none to count where it is bald. So for each style and attribute

    expected counts = sum over the pictures of the uniform distribution of each,
    total variation = 1/2 sum over values |observed - expected| / pictures,     0 exact … 1 disjoint

A finite sample of a perfect model does not get 0. The floor is simulated: choices drawn from those very distributions,
the same number, the mean over many draws. A model that gives one value only is near 1 - 1 / values.

Only prompts that name their style count: without it the style itself is open, and its distribution depends on what the
words allow.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.datasets.portraits import Portrait, allowed

Named = Mapping[str, str]  # attribute (or "style") -> value, as `parse` gives it
DRAWS = 200  # simulated samples for the floor


@dataclass(frozen=True, slots=True)
class Variety:
    """Total variation of one attribute of one style, and what a perfect model of that sample count gets."""

    style: str
    attribute: str
    pictures: int
    variation: float
    floor: float  # mean of perfect models
    high: float  # 97.5 % of them are below
    observed: Mapping[str, int]
    entropy: float  # of what was observed, over that of the expected counts; 1 is full variety, 0 one value only

    @property
    def above_floor(self) -> float:
        return max(0.0, self.variation - self.floor)


def open_choices(named: Named) -> dict[str, tuple[str, ...]]:
    """The attributes that a prompt leaves open, with the values that are equally likely; none without a style."""
    if "style" not in named:
        return {}
    choices = {name: values for name, values in allowed(named["style"]).items() if name not in named}
    if named.get("hair") == "bald":
        choices.pop("hair_color", None)
    if "hair_color" in named and "hair" in choices:
        choices["hair"] = tuple(value for value in choices["hair"] if value != "bald")
    return choices


def variety(asked: Sequence[Named], seen: Sequence[Portrait], seed: int = 0) -> list[Variety]:
    """Total variation of every open attribute of every style. Raises ValueError for unequal numbers."""
    if len(asked) != len(seen):
        raise ValueError(f"one prompt for each picture: got {len(asked)} prompts for {len(seen)} pictures")
    groups: dict[tuple[str, str], list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    for named, portrait in zip(asked, seen, strict=True):
        for name, choices in open_choices(named).items():
            if (value := getattr(portrait, name)) is not None:
                groups[named["style"], name].append((choices, value))
    generator = torch.Generator().manual_seed(seed)
    return [_measured(style, name, pairs, generator) for (style, name), pairs in groups.items()]


def mean_variation(found: Sequence[Variety]) -> tuple[float, float]:
    """Total variation and floor, averaged over groups by their number of pictures."""
    total = sum(one.pictures for one in found)
    return (
        sum(one.variation * one.pictures for one in found) / total,
        sum(one.floor * one.pictures for one in found) / total,
    )


def _measured(style: str, name: str, pairs: list[tuple[tuple[str, ...], str]], generator: torch.Generator) -> Variety:
    values = list(dict.fromkeys(value for choices, _ in pairs for value in choices))
    values += sorted({value for _, value in pairs} - set(values))  # a held-out value that was not asked for
    chances = torch.tensor([[(v in choices) / len(choices) for v in values] for choices, _ in pairs])
    expected = chances.sum(0)
    counts = torch.tensor([[v == value for v in values] for _, value in pairs]).float().sum(0)
    drawn = torch.multinomial(chances, DRAWS, replacement=True, generator=generator)  # (pictures, draws)
    perfect = torch.stack([torch.bincount(column, minlength=len(values)) for column in drawn.T]).float()
    floors = _variation(perfect, expected)
    full = _entropy(expected)
    return Variety(
        style,
        name,
        len(pairs),
        _variation(counts, expected).item(),
        floors.mean().item(),
        floors.quantile(0.975).item(),
        {v: int(n) for v, n in zip(values, counts.tolist(), strict=True)},
        _entropy(counts) / full if full > 0 else 1.0,
    )


def _variation(counts: Float[Tensor, "*d v"], expected: Float[Tensor, " v"]) -> Float[Tensor, "*d"]:
    return (counts - expected).abs().sum(-1) / (2 * expected.sum())


def _entropy(counts: Float[Tensor, " v"]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return -(shares * shares.log()).sum().item()
