"""What a portrait can be: seven styles, and each visible attribute with the values that a person would tell apart.

DiceBear names its parts `variant26` or `sideComed`, mixes glasses with eyes, and has dozens of mouths that look alike
at 128 pixels. Here each style keeps the values that are visibly different, under a plain word that means the same in
every style. One of our values may set several parts (angry: brows and mouth), and a part that we do not vary is fixed.

Nothing is hidden: a value that would cover another attribute (hats over hair, beards over mouths) is left out, and a
bald head has no hair color. So within a style all attributes are independent, and every one of them can be seen.

Each style has two colors that it is never trained with (`HELD_OUT`). Both the style and the color are common
elsewhere, so whether a model can combine them is a question about composition and not about drawing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

HAIR_COLORS = {
    "black": "1a1a1a",
    "brown": "54301a",
    "blond": "f0c94a",
    "red": "d8401f",
    "blue": "2f6fe0",
    "green": "2fa84f",
    "pink": "f06fb0",
    "white": "f4f4f4",
}
SKINS = {"light": "f9d3b4", "tan": "d99e72", "brown": "b0713f", "dark": "7a4b30"}
VEILED_SKINS = {"light": "f3c6ab", "tan": "d98c50", "brown": "a0522d", "dark": "6b2f12"}  # under a white veil of 36 %
SHIRTS = {
    "red": "d8323c",
    "blue": "2b5fd9",
    "green": "2a9d4a",
    "yellow": "f2b705",
    "purple": "7a3fc4",
    "black": "222222",
}
BACKGROUNDS = {
    "blue": "b6e3f4",
    "purple": "c0aede",
    "pink": "ffc2d1",
    "orange": "ffd2a1",
    "green": "bfe8b5",
    "yellow": "fff0a3",
}
ORDER = (
    "hair",
    "hair_color",
    "skin",
    "mood",
    "eyes",
    "accessory",
    "beard",
    "clothes",
    "pattern",
    "shirt",
    "background",
)
BALD = "bald"  # the one value of `hair` without a color

Parts = Mapping[str, str]  # group of parts -> the part chosen


@dataclass(frozen=True, slots=True)
class Style:
    """One style: the parts of each value, the colors that each attribute sets, and what never changes."""

    fixed: Parts
    parts: Mapping[str, Mapping[str, Parts]]  # attribute -> value -> parts
    colors: Mapping[str, tuple[str, ...]]  # attribute -> names of DiceBear's colors
    fixed_colors: Mapping[str, str] = field(default_factory=dict)
    skins: Mapping[str, str] = field(default_factory=lambda: SKINS)

    def hex(self, attribute: str, value: str) -> str:
        """The six hex digits of a color."""
        return self._palette(attribute)[value]

    def _palette(self, attribute: str) -> Mapping[str, str]:
        return {"hair_color": HAIR_COLORS, "skin": self.skins, "shirt": SHIRTS, "background": BACKGROUNDS}[attribute]

    def values(self) -> dict[str, tuple[str, ...]]:
        """Attribute -> its values, in the order of `ORDER`."""
        named = {name: tuple(choices) for name, choices in self.parts.items()}
        return {n: named[n] if n in named else tuple(self._palette(n)) for n in ORDER if n in named or n in self.colors}


def _one(group: str, **values: str | None) -> dict[str, Parts]:
    """Values that set one part; underscores in a value are spaces, None is no part."""
    return {name.replace("_", " "): {group: part} if part else {} for name, part in values.items()}


def _several(groups: tuple[str, ...], **values: tuple[str, ...]) -> dict[str, Parts]:
    """Values that set several parts at once."""
    return {name.replace("_", " "): dict(zip(groups, parts, strict=True)) for name, parts in values.items()}


_TOON = Style(
    {"body": "body", "head": "head"},
    {
        "hair": {
            "short": {"hair": "sideComed"},
            "spiky": {"hair": "spiky"},
            "half shaved": {"hair": "undercut"},
            "bun": {"hair": "bun"},
            "long": {"hair": "sideComed", "rearHair": "longStraight"},
            "wavy": {"hair": "sideComed", "rearHair": "longWavy"},
            "bob": {"hair": "sideComed", "rearHair": "neckHigh"},
        },
        "mood": _several(
            ("mouth", "eyebrows"),
            smiling=("smile", "happy"),
            laughing=("laugh", "happy"),
            sad=("sad", "sad"),
            angry=("angry", "angry"),
            surprised=("agape", "raised"),
        ),
        "eyes": _one("eyes", open="wide", closed="humble", winking="wink"),
        "beard": _one("beard", no_beard=None, mustache="moustacheTwirl", beard="longBeard"),
        "clothes": _several(
            ("clothes",), tee=("tShirt",), turtleneck=("turtleNeck",), jacket=("openJacket",), dress=("dress",)
        ),
    },
    {"hair_color": ("hair",), "skin": ("skin",), "shirt": ("clothes",), "background": ("background",)},
)
_JOLLY = Style(
    {"face": "base"},
    {
        "hair": _one(
            "hair",
            short="shortHair",
            mohawk="mohawk",
            wavy="wavyBob",
            bowl_cut="bowlCutHair",
            fluffy="curlyBob",
            long="straightHair",
            braids="braids",
            buzz_cut="shavedHead",
            bun="bunHair",
            half_shaved="halfShavedHead",
            curly="curlyShortHair",
        ),
        "mood": _several(
            ("mouth", "eyes"),
            smiling=("kawaii", "normal"),
            laughing=("openedSmile", "normal"),
            neutral=("unimpressed", "normal"),
            sad=("openSad", "sad"),
            angry=("awkwardSmile", "angry"),
        ),
        "accessory": _one(
            "accessories",
            no_accessory=None,
            glasses="glasses",
            sunglasses="sunglasses",
            cat_ears="catEars",
            red_nose="clownNose",
        ),
    },
    {"hair_color": ("hair",), "skin": ("skin",), "background": ("background",)},
)
_INKED = Style(
    {"base": "standard", "ears": "attached", "nose": "curve", "shirt": "crew", "eyes": "eyes"},
    {
        "hair": _one(
            "hair", quiff="fonze", mohawk="mrT", bald="mrClean", fringe="dannyPhantom", long="full", bob="pixie"
        ),
        "mood": _several(
            ("mouth", "eyebrows"),
            smiling=("smile", "up"),
            laughing=("laughing", "up"),
            nervous=("nervous", "up"),
            sad=("frown", "down"),
            surprised=("surprised", "up"),
            kissing=("pucker", "up"),
        ),
        "accessory": _one("glasses", no_glasses=None, glasses="round"),
    },
    {"hair_color": ("hair",), "skin": ("base",), "shirt": ("shirt",), "background": ("background",)},
    {"mouth": "000000", "eyebrows": "000000", "eyes": "000000", "glasses": "000000"},
)
_DOODLE = Style(
    {},
    {
        "hair": _one(
            "hair",
            short="plain",
            quiff="wavy",
            curly="shortCurls",
            parted="parting",
            spiky="spiky",
            long="roundBob",
            long_curly="longCurls",
            buns="buns",
            bob="bangs",
            fluffy="fluffy",
            flat_top="flatTop",
            shaggy="shaggy",
        ),
        "mood": _one(
            "mood",
            smiling="happy",
            laughing="superHappy",
            neutral="neutral",
            sad="sad",
            angry="angry",
            hopeful="hopeful",
            confused="confused",
        ),
        "beard": _one("facialHair", no_beard=None, stubble="default"),
    },
    {"hair_color": ("hair",), "skin": ("skin",), "background": ("background",)},
)
_FLAT = Style(
    {"nose": "smallRound"},
    {
        "hair": _one(
            "hair",
            short="shortCombover",
            half_shaved="sideShave",
            bob="bobCut",
            long="extraLong",
            curly="curly",
            pigtails="pigtails",
            bun="straightBun",
            bald="bald",
            balding="balding",
        ),
        "mood": _one("mouth", smiling="smile", laughing="bigSmile", sad="frown", surprised="surprise", kissing="lips"),
        "accessory": _one("eyes", no_glasses="open", glasses="glasses", sunglasses="sunglasses"),
        "beard": _one("facialHair", no_beard=None, mustache="pyramid", goatee="goatee"),
        "pattern": _one("body", plain="squared", checkered="checkered"),
    },
    {"hair_color": ("hair",), "skin": ("skin",), "shirt": ("clothing",), "background": ("background",)},
    skins=VEILED_SKINS,
)
_STORYBOOK = Style(
    {"base": "default"},
    {
        "hair": _one(
            "hair",
            short="short04",
            spiky="short16",
            mohawk="short15",
            curly="short03",
            ponytail="long19",
            braids="long16",
            pigtails="long15",
            buns="long23",
            long="long09",
            wavy="long24",
            bob="long01",
            fringe="long07",
        ),
        "mood": _several(
            ("mouth", "eyebrows", "eyes"),
            smiling=("variant02", "variant10", "variant26"),
            laughing=("variant26", "variant10", "variant26"),
            sad=("variant14", "variant07", "variant15"),
            angry=("variant11", "variant01", "variant26"),
            surprised=("variant15", "variant04", "variant24"),
            cheeky=("variant16", "variant10", "variant26"),
            kissing=("variant06", "variant10", "variant26"),
        ),
        "accessory": _one("glasses", no_glasses=None, glasses="variant02", sunglasses="variant01"),
    },
    {"hair_color": ("hair",), "skin": ("skin",), "background": ("background",)},
)
_PIXEL = Style(
    {"eyes": "variant06"},
    {
        "hair": _one(
            "hair",
            short="short22",
            spiky="short11",
            mohawk="short05",
            flat_top="short16",
            balding="short18",
            long="long12",
            bob="long04",
            pigtails="long18",
            bun="long05",
        ),
        "mood": _one("mouth", smiling="happy09", laughing="happy12", neutral="sad06", sad="sad01", surprised="happy01"),
        "accessory": _one("glasses", no_glasses=None, glasses="light06", sunglasses="dark03"),
        "pattern": _one("clothing", plain="variant12", checkered="variant06", striped="variant13"),
    },
    {"hair_color": ("hair",), "skin": ("skin",), "shirt": ("clothing",), "background": ("background",)},
    {"mouth": "9c2020", "eyes": "3a3a3a", "glasses": "191919"},
)

TABLES: Mapping[str, Style] = {
    "toon": _TOON,
    "jolly": _JOLLY,
    "inked": _INKED,
    "doodle": _DOODLE,
    "flat": _FLAT,
    "storybook": _STORYBOOK,
    "pixel": _PIXEL,
}
STYLES: tuple[str, ...] = tuple(TABLES)
ATTRIBUTES: Mapping[str, Mapping[str, tuple[str, ...]]] = {name: style.values() for name, style in TABLES.items()}
HELD_OUT: Mapping[str, Mapping[str, str]] = {  # style -> attribute -> the color it is never trained with
    "toon": {"hair_color": "blue", "shirt": "yellow"},
    "jolly": {"hair_color": "green", "background": "orange"},
    "inked": {"hair_color": "pink", "shirt": "red"},
    "doodle": {"hair_color": "blond", "background": "blue"},
    "flat": {"hair_color": "red", "shirt": "green"},
    "storybook": {"hair_color": "white", "background": "yellow"},
    "pixel": {"hair_color": "black", "shirt": "purple"},
}
