"""A portrait is a style and a value for each attribute of that style; who may train on it is a property of itself.

Three splits, decided by the portrait alone, so that no list is kept and nothing can leak by sampling more:

    held_out   it has at least one pair of style and color that is never trained (`HELD_OUT`)
    test       no such pair, and its SHA-256 falls into one part of twenty
    train      the others

`sample` draws uniformly within a split: every style equally likely, every attribute independent and uniform over the
values that the split allows (`allowed`). For `held_out` all values are allowed, given that a held-out pair is
among them.
"""

import hashlib
import random
from dataclasses import astuple, dataclass
from typing import Literal, get_args

from diffusion_opt.datasets.portraits.tables import ATTRIBUTES, BALD, HELD_OUT, ORDER, STYLES
from diffusion_opt.names import nearest

Split = Literal["train", "test", "held_out"]
_TEST_PART = 20  # one portrait in twenty is for testing


@dataclass(frozen=True, slots=True)
class Portrait:
    """What can be seen on one picture; None where the style has no such attribute (a bald head has no hair color).

    Raises ValueError for an unknown style or value, a missing one, and one that the style does not have.
    """

    style: str
    hair: str | None = None
    hair_color: str | None = None
    skin: str | None = None
    mood: str | None = None
    eyes: str | None = None
    accessory: str | None = None
    beard: str | None = None
    clothes: str | None = None
    pattern: str | None = None
    shirt: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(
                f"no style {self.style!r}{nearest(str(self.style), STYLES)}: use one of {', '.join(STYLES)}"
            )
        known = ATTRIBUTES[self.style]
        for name in ORDER:
            value = getattr(self, name)
            if name not in known or (name == "hair_color" and self.hair == BALD):
                if value is not None:
                    why = "a bald head has no hair color" if name in known else f"the {self.style} style has no {name}"
                    raise ValueError(f"{why}, got {name}={value!r}; leave it None")
            elif value not in known[name]:
                raise ValueError(
                    f"{name} of the {self.style} style must be one of {', '.join(known[name])}, "
                    f"got {value!r}{nearest(str(value), known[name])}"
                )

    def attributes(self) -> dict[str, str]:
        """The attributes that it has, without the style: name -> value."""
        return {name: getattr(self, name) for name in ORDER if getattr(self, name) is not None}


def held_out_pairs(portrait: Portrait) -> frozenset[str]:
    """Names of its attributes whose value is never trained together with its style."""
    return frozenset(name for name, value in HELD_OUT[portrait.style].items() if getattr(portrait, name) == value)


def split_of(portrait: Portrait) -> Split:
    """To which split a portrait belongs, now and for ever."""
    if held_out_pairs(portrait):
        return "held_out"
    digest = hashlib.sha256(repr(astuple(portrait)).encode()).digest()
    return "test" if digest[0] * 256 + digest[1] < 65536 // _TEST_PART else "train"


def allowed(style: str, split: Split = "train") -> dict[str, tuple[str, ...]]:
    """Attribute -> the values that portraits of this style have in a split."""
    never = HELD_OUT[style] if split != "held_out" else {}
    return {k: tuple(v for v in values if v != never.get(k)) for k, values in ATTRIBUTES[style].items()}


def sample(n: int, seed: int, split: Split = "train") -> list[Portrait]:
    """`n` portraits of a split, uniform; the same seed gives the same ones, and a smaller n the first of a larger.

    Raises ValueError for a negative number or an unknown split.
    """
    if n < 0:
        raise ValueError(f"the number of portraits must not be negative, got {n}")
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    chance = random.Random(f"portraits {split} {seed}")
    return [_draw_one(chance, split) for _ in range(n)]


def _draw_one(chance: random.Random, split: Split) -> Portrait:
    """One portrait: the style first, then attributes until they fall into the split, so styles stay equally likely."""
    style = chance.choice(STYLES)
    choices = allowed(style, split)
    while True:
        chosen = {name: chance.choice(values) for name, values in choices.items()}
        if chosen["hair"] == BALD:
            chosen["hair_color"] = None
        portrait = Portrait(style, **chosen)
        if split_of(portrait) == split:
            return portrait
