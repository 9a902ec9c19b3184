"""Read a prompt: which attributes it names, in any order and any of the known words.

Words are matched longest first ("flat top" is hair, "flat" a style; "red nose" is no color). A color takes its meaning
from its neighbors: the noun that follows it, over adjectives ("pink curly hair", "red striped shirt"), or the
preposition before it ("on mint" is the background, "in red" the clothes). Nothing is guessed: an unknown word, a color
without a noun, two values for one attribute, and a combination that no style can draw are refused, with what to say.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from diffusion_opt.datasets.portraits import words
from diffusion_opt.datasets.portraits.tables import ATTRIBUTES, BALD, STYLES

_HEADS = {"hair": "hair_color", "hair noun": "hair_color", "skin": "skin", "garment": "shirt", "backdrop": "background"}
_BEFORE = {"on": "background", "in": "shirt"}
_SKIPPED = ("hair adjective", "pattern")  # between a color and its noun


@dataclass(frozen=True, slots=True)
class _Token:
    """A phrase as found: its kind, and the values that it names by itself."""

    text: str
    kind: str
    names: tuple[tuple[str, str], ...] = ()


def parse(text: str) -> dict[str, str]:
    """Attribute (and "style") -> value, for everything that a prompt names; the empty text names nothing.

    Raises ValueError, with the nearest known words, for an unknown word, a color of nothing, a color that this thing
    does not come in, two different values of one attribute, and a combination that no style has.
    """
    tokens = list(_tokens(text))
    found: dict[str, str] = {}
    for at, token in enumerate(tokens):
        for name, value in _color(tokens, at) if token.kind in ("color", "color person") else token.names:
            if found.get(name, value) != value:
                raise ValueError(f"{text!r} names two values of {name}: {found[name]} and {value}; keep one")
            found[name] = value
    _check_drawable(found)
    return found


def styles_for(named: dict[str, str]) -> tuple[str, ...]:
    """The styles that have all of these values."""
    wanted = {name: value for name, value in named.items() if name != "style"}
    candidates = (named["style"],) if "style" in named else STYLES
    return tuple(s for s in candidates if all(v in ATTRIBUTES[s].get(name, ()) for name, v in wanted.items()))


def _check_drawable(named: dict[str, str]) -> None:
    if named.get("hair") == BALD and "hair_color" in named:
        raise ValueError(f"a bald head has no hair color, but {named['hair_color']} is named; leave one out")
    if styles_for(named):
        return
    style = named.get("style")
    for name, value in named.items():
        if name != "style" and not styles_for({name: value} | ({"style": style} if style else {})):
            there = ATTRIBUTES[style].get(name) if style else None
            others = ", ".join(s for s in STYLES if value in ATTRIBUTES[s].get(name, ()))
            have = f"its {name} is one of {', '.join(there)}" if there else f"it has no {name}"
            raise ValueError(f"the {style} style has no {name} {value!r}: {have}; {value} exists in {others}")
    raise ValueError(f"no style has all of {', '.join(f'{n} {v}' for n, v in named.items())}; leave one out")


@cache
def _lexicon() -> dict[tuple[str, ...], _Token]:
    """Every phrase by its words. Where a phrase has two meanings the later one below stands."""
    out: dict[tuple[str, ...], _Token] = {}

    def add(phrase: str, kind: str, **names: str) -> None:
        out[tuple(phrase.split())] = _Token(phrase, kind, tuple(names.items()))

    for palette in words.PALETTES.values():
        for phrase in (phrase for phrases in palette.values() for phrase in phrases):
            add(phrase, "color")
    for kind, phrases in (
        ("filler", words.FILLERS + words.NOUNS),
        ("garment", words.GARMENTS),
        ("backdrop", words.BACKDROPS),
        ("skin", words.SKIN_NOUNS),
        ("hair", ("hair", "haired")),
        ("on", ("on", "on a", "on an", "before a", "before an")),
        ("in", ("in", "in a", "in an", "wearing", "wearing a", "wearing an", "dressed in")),
    ):
        for phrase in phrases:
            add(phrase, kind)
    for attribute, table in words.SPOKEN_ALONE.items():
        for value, phrases in table.items():
            for phrase in phrases:
                kind = "pattern" if attribute == "pattern" else "value"
                add(phrase, kind, **{attribute: value})
                add(phrase.removeprefix("a "), kind, **{attribute: value})
    for kind, table in (("hair adjective", words.HAIR_ADJECTIVES), ("hair noun", words.HAIR_NOUNS)):
        for value, phrases in table.items():
            for phrase in phrases:
                add(phrase, kind, hair=value)
    for value, phrases in words.CLOTHES_WORDS.items():
        for phrase in phrases:
            add(phrase, "garment", clothes=value)
    for phrase in words.BALD_WORDS:
        add(phrase, "value", hair=BALD)
    for phrase, names in words.PEOPLE.items():
        add(phrase, "color person" if (phrase,) in out else "value", **names)
    return out


def _tokens(text: str) -> Iterator[_Token]:
    """Phrases of a text, longest match first; marks between clauses become tokens of kind "end"."""
    lexicon = _lexicon()
    longest = max(map(len, lexicon))
    for clause in re.split(r"[,.;:!?]", text.lower().replace("-", " ")):
        rest = clause.split()
        while rest:
            size = next((n for n in range(min(longest, len(rest)), 0, -1) if tuple(rest[:n]) in lexicon), 0)
            if not size:
                raise ValueError(_unknown(rest[0], text))
            yield lexicon[tuple(rest[:size])]
            rest = rest[size:]
        yield _Token("", "end")


def _unknown(word: str, text: str) -> str:
    known = sorted({w for phrase in _lexicon() for w in phrase})
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "say for example 'a toon portrait with curly pink hair'"
    return f"{word!r} in {text!r} is not a word for portraits; {hint}"


def _color(tokens: list[_Token], at: int) -> tuple[tuple[str, str], ...]:
    """What a color word names: the attribute of the noun after it, or of the preposition before it."""
    color, after = tokens[at], at + 1
    while tokens[after].kind in _SKIPPED:
        after += 1
    before = [token for token in tokens[:at] if token.text not in ("a", "an", "the")]
    attribute = _HEADS.get(tokens[after].kind) or (_BEFORE.get(before[-1].kind) if before else None)
    if attribute is None and color.kind == "color person":
        return color.names
    if attribute is None:
        meant = [name for name, palette in words.PALETTES.items() if _value(palette, color.text)]
        nouns = {"hair_color": "hair", "skin": "skin", "shirt": "shirt", "background": "background"}
        ways = " or ".join(f"'{color.text} {nouns[name]}'" for name in meant)
        raise ValueError(f"what is {color.text}? Say {ways}")
    if value := _value(words.PALETTES[attribute], color.text):
        return ((attribute, value),)
    offered = ", ".join(words.PALETTES[attribute])
    raise ValueError(f"{attribute.replace('_', ' ')} comes in {offered}, not in {color.text}")


def _value(palette: words.Words, word: str) -> str | None:
    return next((value for value, known in palette.items() if word in known), None)
