"""The words for portraits: what each value may be called, and which words need a neighbor to mean something.

The first word of each list is the one that `prompt` uses; the others are synonyms for variety, so that a text encoder
learns that `shades` are sunglasses. A color word means nothing alone: `brown hair` and `brown skin` are different
attributes, and `mint` is a green background. Prompts are written and read by the same tables, so that what one side
says the other side understands.

Hyphens count as spaces, upper case as lower case.
"""

from collections.abc import Mapping

Words = Mapping[str, tuple[str, ...]]

STYLE_WORDS: Words = {
    "toon": ("toon", "cartoon", "animated"),
    "jolly": ("jolly", "bobblehead"),
    "inked": ("inked", "ink", "comic"),
    "doodle": ("doodle", "doodled", "scribble"),
    "flat": ("flat", "flat design", "minimalist"),
    "storybook": ("storybook", "picture book"),
    "pixel": ("pixel", "pixel art", "8 bit"),
}
HAIR_ADJECTIVES: Words = {  # go before "hair"
    "short": ("short",),
    "spiky": ("spiky", "spiked"),
    "half shaved": ("half shaved", "side shaved"),
    "long": ("long",),
    "wavy": ("wavy",),
    "fluffy": ("fluffy", "puffy"),
    "curly": ("curly",),
    "long curly": ("long curly", "curly long"),
    "parted": ("parted", "center parted"),
    "shaggy": ("shaggy", "messy"),
    "balding": ("balding", "thinning", "receding"),
}
HAIR_NOUNS: Words = {  # stand alone, after a color
    "bun": ("bun", "topknot"),
    "bob": ("bob",),
    "mohawk": ("mohawk",),
    "bowl cut": ("bowl cut",),
    "braids": ("braids", "plaits"),
    "buzz cut": ("buzz cut", "crew cut"),
    "quiff": ("quiff", "pompadour"),
    "fringe": ("fringe", "bangs"),
    "buns": ("buns", "space buns", "two buns"),
    "flat top": ("flat top",),
    "pigtails": ("pigtails",),
    "ponytail": ("ponytail",),
}
PLURALS = ("braids", "plaits", "bangs", "buns", "space buns", "two buns", "pigtails")  # take no article
HAIR_COLOR_WORDS: Words = {
    "black": ("black",),
    "brown": ("brown", "brunette"),
    "blond": ("blond", "blonde", "golden"),
    "red": ("red", "ginger"),
    "blue": ("blue",),
    "green": ("green",),
    "pink": ("pink",),
    "white": ("white", "snowy"),
}
SKIN_WORDS: Words = {
    "light": ("light", "pale", "fair"),
    "tan": ("tan", "tanned", "olive"),
    "brown": ("brown",),
    "dark": ("dark", "deep"),
}
SHIRT_WORDS: Words = {
    "red": ("red",),
    "blue": ("blue",),
    "green": ("green",),
    "yellow": ("yellow",),
    "purple": ("purple", "violet"),
    "black": ("black",),
}
BACKGROUND_WORDS: Words = {
    "blue": ("blue", "sky blue"),
    "purple": ("purple", "lavender", "lilac"),
    "pink": ("pink", "rose"),
    "orange": ("orange", "peach"),
    "green": ("green", "mint"),
    "yellow": ("yellow", "lemon"),
}
MOOD_WORDS: Words = {
    "smiling": ("smiling", "happy"),
    "laughing": ("laughing", "joyful"),
    "neutral": ("neutral", "calm", "serious"),
    "sad": ("sad", "unhappy", "gloomy"),
    "angry": ("angry", "furious", "mad"),
    "surprised": ("surprised", "amazed", "shocked"),
    "nervous": ("nervous", "anxious"),
    "kissing": ("kissing",),
    "hopeful": ("hopeful", "wistful"),
    "confused": ("confused", "puzzled"),
    "cheeky": ("cheeky", "tongue out"),
}
EYES_WORDS: Words = {
    "open": ("open eyes", "eyes open"),
    "closed": ("closed eyes", "eyes closed"),
    "winking": ("a wink", "one eye closed"),
}
ACCESSORY_WORDS: Words = {
    "no accessory": ("no accessory", "no accessories", "nothing extra"),
    "no glasses": ("no glasses",),
    "glasses": ("glasses", "spectacles"),
    "sunglasses": ("sunglasses", "shades"),
    "cat ears": ("cat ears", "kitty ears"),
    "red nose": ("a red nose", "a clown nose"),
}
BEARD_WORDS: Words = {
    "no beard": ("no beard", "no facial hair"),
    "mustache": ("a mustache",),
    "beard": ("a beard", "a full beard"),
    "stubble": ("stubble", "some stubble"),
    "goatee": ("a goatee",),
}
CLOTHES_WORDS: Words = {
    "tee": ("t shirt", "tee"),
    "turtleneck": ("turtleneck", "roll neck"),
    "jacket": ("jacket", "coat"),
    "dress": ("dress", "gown"),
}
PATTERN_WORDS: Words = {
    "plain": ("plain",),
    "checkered": ("checkered", "plaid"),
    "striped": ("striped", "stripy"),
}
GARMENTS = ("shirt", "top", "outfit")  # no particular clothes
BACKDROPS = ("background", "backdrop")
NOUNS = ("portrait", "avatar", "face", "person", "character", "picture", "head")
SKIN_NOUNS = ("skin", "skinned", "complexion")
BALD_WORDS = ("bald", "no hair", "hairless")
PEOPLE: Mapping[str, Mapping[str, str]] = {  # a noun that says more
    "punk": {"hair": "mohawk"},
    "redhead": {"hair_color": "red"},
    "blonde": {"hair_color": "blond"},
    "blond": {"hair_color": "blond"},
    "brunette": {"hair_color": "brown"},
}
SPOKEN_ALONE: Mapping[str, Words] = {  # attributes whose words need no neighbor
    "style": STYLE_WORDS,
    "mood": {
        **MOOD_WORDS,
        "smiling": (*MOOD_WORDS["smiling"], "a smile"),
        "laughing": (*MOOD_WORDS["laughing"], "a laugh"),
    },
    "eyes": {**EYES_WORDS, "winking": (*EYES_WORDS["winking"], "winking")},
    "accessory": {**ACCESSORY_WORDS, "no glasses": ("no glasses", "without glasses")},
    "beard": {
        **BEARD_WORDS,
        "no beard": (*BEARD_WORDS["no beard"], "without a beard", "clean shaven"),
        "beard": (*BEARD_WORDS["beard"], "bearded"),
        "stubble": (*BEARD_WORDS["stubble"], "unshaven", "stubbly"),
    },
    "pattern": PATTERN_WORDS,
}
PALETTES: Mapping[str, Words] = {  # attributes whose words are colors, told apart by their neighbors
    "hair_color": HAIR_COLOR_WORDS,
    "skin": SKIN_WORDS,
    "shirt": SHIRT_WORDS,
    "background": BACKGROUND_WORDS,
}
FILLERS = ("a", "an", "the", "with", "and", "of", "style", "is", "who", "has", "some", "by")
