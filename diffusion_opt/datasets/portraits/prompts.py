"""Prompts that name a part of a portrait, in varied words.

A prompt that names everything fixes the picture, and one step is then as good as fifty. So a prompt names a random
part: the style four times in five, and any number of the other attributes, each number equally likely. What it leaves
out is left to the model, and because portraits are uniform, so should its choices be.

Which attributes are named must not depend on their values, or silence itself would say something. A bald head is where
it could: it has no hair color to name. Where hair color was to be named, a bald portrait says "bald".

Two forms: a list ("flat portrait, curly pink hair, laughing, on mint") in any order, and a sentence ("a laughing flat
portrait with curly pink hair on a mint background"). The empty text names nothing and is the null prompt.
"""

import random

import torch

from diffusion_opt.datasets.portraits import words
from diffusion_opt.datasets.portraits.portrait import Portrait
from diffusion_opt.datasets.portraits.tables import BALD, ORDER

STYLE_NAMED = 0.8  # chance that a partial prompt names the style
_LOOSE = ("style", "hair", "skin", "mood", "eyes", "accessory", "beard", "clothes", "background")  # order of a list


class _Plain:
    """The first word always: what `prompt` speaks by default."""

    def choice(self, options):
        return options[0]

    def random(self) -> float:
        return 1.0

    def shuffle(self, items: list) -> None:
        pass


def prompt(portrait: Portrait, names: frozenset[str], chance: random.Random | None = None) -> str:
    """The words for some attributes of a portrait ("style" among them); `chance` varies words, order and form.

    Raises ValueError for a name that this portrait has no value for.
    """
    has = {"style", *portrait.attributes()}
    if unknown := sorted(names - has):
        raise ValueError(f"this {portrait.style} portrait has no {unknown[0]} to name; it has {', '.join(sorted(has))}")
    return _Speaker(portrait, names, chance or _Plain()).say()


def choose_names(portrait: Portrait, chance: random.Random) -> frozenset[str]:
    """Which attributes a partial prompt names, at least one; their number is uniform, independent of their values."""
    has = [name for name in ORDER if name in portrait.attributes() or (name == "hair_color" and portrait.hair == BALD)]
    style = chance.random() < STYLE_NAMED
    names = set(chance.sample(has, chance.randint(0 if style else 1, len(has)))) | ({"style"} if style else set())
    if portrait.hair == BALD and "hair_color" in names:
        names = names - {"hair_color"} | {"hair"}
    return frozenset(names)


def partial_prompt(portrait: Portrait, generator: torch.Generator) -> tuple[str, frozenset[str]]:
    """A prompt that names a random part of a portrait in random words, and the names of what it says."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    chance = random.Random(seed)
    names = choose_names(portrait, chance)
    return prompt(portrait, names, chance), names


class _Speaker:
    """Puts one prompt together: `one` picks a synonym, the other methods make the pieces."""

    def __init__(self, portrait: Portrait, names: frozenset[str], chance) -> None:
        self.portrait, self.names, self.chance = portrait, names, chance

    def say(self) -> str:
        return self._sentence() if self.chance.random() < 0.5 else self._list()

    def one(self, table: words.Words, attribute: str) -> str:
        return self.chance.choice(table[getattr(self.portrait, attribute)])

    def _list(self) -> str:
        pieces = {
            "style": f"{self.one(words.STYLE_WORDS, 'style')} {self.chance.choice(('portrait', 'style', 'avatar'))}"
            if "style" in self.names
            else "",
            "hair": self._hair(),
            "skin": self._skin(),
            "mood": self.one(words.MOOD_WORDS, "mood") if "mood" in self.names else "",
            "eyes": self.one(words.EYES_WORDS, "eyes") if "eyes" in self.names else "",
            "accessory": self.one(words.ACCESSORY_WORDS, "accessory") if "accessory" in self.names else "",
            "beard": self.one(words.BEARD_WORDS, "beard") if "beard" in self.names else "",
            "clothes": self._clothes(),
            "background": self._background(),
        }
        said = [pieces[name] for name in _LOOSE if pieces[name]]
        self.chance.shuffle(said)
        return ", ".join(said)

    def _sentence(self) -> str:
        if not self.names:
            return ""
        front = [self.one(words.MOOD_WORDS, "mood")] if "mood" in self.names else []
        front += [self.one(words.STYLE_WORDS, "style")] if "style" in self.names else []
        is_punk = self.names >= {"hair"} and self.portrait.hair == "mohawk" and self.chance.random() < 0.4
        front.append("punk" if is_punk else self.chance.choice(words.NOUNS))
        parts = [self._hair(without_shape=is_punk), self._skin()]
        parts += [self.one(words.EYES_WORDS, "eyes")] if "eyes" in self.names else []
        parts += [self.one(words.ACCESSORY_WORDS, "accessory")] if "accessory" in self.names else []
        parts += [self.one(words.BEARD_WORDS, "beard")] if "beard" in self.names else []
        parts = [part for part in parts if part]
        self.chance.shuffle(parts)
        text = _article(" ".join(front))
        if parts:
            text += " with " + " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        clothes, background = self._clothes(), self._background()
        if clothes:
            text += (
                f" {clothes}" if clothes.startswith("in ") else f" {self.chance.choice(('in', 'wearing'))} {clothes}"
            )
        if background:
            text += f" {background}" if background.startswith("on ") else f" on {_article(background)}"
        return text

    def _hair(self, without_shape: bool = False) -> str:
        shape, color = "hair" in self.names and not without_shape, "hair_color" in self.names
        if shape and self.portrait.hair == BALD:
            return self.chance.choice(("a bald head", "no hair"))
        tint = self.one(words.HAIR_COLOR_WORDS, "hair_color") if color else ""
        if not shape:
            return f"{tint} hair" if color else ""
        if self.portrait.hair in words.HAIR_NOUNS:
            noun = self.one(words.HAIR_NOUNS, "hair")
            phrase = f"{tint} {noun}".strip()
            return phrase if noun in words.PLURALS else _article(phrase)
        adjectives = [self.one(words.HAIR_ADJECTIVES, "hair"), tint]
        if self.chance.random() < 0.3:
            adjectives.reverse()
        return " ".join([*filter(None, adjectives), "hair"])

    def _skin(self) -> str:
        return f"{self.one(words.SKIN_WORDS, 'skin')} skin" if "skin" in self.names else ""

    def _clothes(self) -> str:
        named = self.names & {"clothes", "pattern", "shirt"}
        if not named:
            return ""
        tint = self.one(words.SHIRT_WORDS, "shirt") if "shirt" in named else ""
        if named == {"shirt"} and self.chance.random() < 0.3:
            return f"in {tint}"
        adjectives = [tint, self.one(words.PATTERN_WORDS, "pattern") if "pattern" in named else ""]
        if self.chance.random() < 0.3:
            adjectives.reverse()
        noun = self.one(words.CLOTHES_WORDS, "clothes") if "clothes" in named else self.chance.choice(words.GARMENTS)
        return _article(" ".join([*filter(None, adjectives), noun]))

    def _background(self) -> str:
        if "background" not in self.names:
            return ""
        tint = self.one(words.BACKGROUND_WORDS, "background")
        return f"on {tint}" if self.chance.random() < 0.4 else f"{tint} {self.chance.choice(words.BACKDROPS)}"


def _article(phrase: str) -> str:
    """`a` or `an` before a phrase; "8 bit" is spoken with a vowel."""
    return f"an {phrase}" if phrase[0] in "aeiou8" else f"a {phrase}"
