"""Prompts say what they should, in words that the parser reads back."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_opt.datasets.portraits import Portrait, choose_names, parse, partial_prompt, prompt, sample, words
from diffusion_opt.datasets.portraits.parsing import styles_for

PORTRAITS = [p for split in ("train", "test", "held_out") for p in sample(250, 11, split)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PORTRAITS), st.integers(0, 2**32), st.data())
def test_every_phrasing_is_read_back(portrait, seed, data):
    has = ["style", *portrait.attributes()]
    names = frozenset(data.draw(st.lists(st.sampled_from(has), unique=True)))
    said = {name: getattr(portrait, name) for name in names}
    assert parse(prompt(portrait, names, random.Random(seed))) == said
    assert parse(prompt(portrait, names)) == said


def test_every_word_of_the_tables_is_spoken_or_read():
    """All synonyms turn up in prompts, so a text encoder that trains on them has seen what a user may say."""
    chance = random.Random(0)
    spoken = " ".join(prompt(p, choose_names(p, chance), chance) for p in PORTRAITS * 3)
    tables = (words.STYLE_WORDS, words.HAIR_ADJECTIVES, words.HAIR_NOUNS, words.MOOD_WORDS, words.CLOTHES_WORDS)
    silent = [
        w for table in (*tables, *words.PALETTES.values()) for ws in table.values() for w in ws if w not in spoken
    ]
    assert not silent


def test_partial_prompts_follow_the_generator():
    portrait = PORTRAITS[0]
    first = partial_prompt(portrait, torch.Generator().manual_seed(3))
    assert first == partial_prompt(portrait, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    assert len({partial_prompt(portrait, generator)[0] for _ in range(20)}) > 15


def test_silence_says_nothing_about_hair():
    """Of the inked portraits whose prompt names neither hair nor its color, one in six is bald, as of all of them."""
    chance = random.Random(2)
    silent = [p for p in sample(4000, 5) if p.style == "inked" and not choose_names(p, chance) & {"hair", "hair_color"}]
    share = Counter(p.hair for p in silent)["bald"] / len(silent)
    assert abs(share - 1 / 6) < 4 * (5 / 36 / len(silent)) ** 0.5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", {}),
        ("punk with green hair", {"hair": "mohawk", "hair_color": "green"}),
        (
            "Flat portrait, curly pink hair, laughing, on mint",
            {"style": "flat", "hair": "curly", "hair_color": "pink", "mood": "laughing", "background": "green"},
        ),
        ("a flat portrait with a flat top", ValueError),
        ("pixel portrait with a flat top, on lavender", {"style": "pixel", "hair": "flat top", "background": "purple"}),
        ("a brown-skinned redhead in a jacket", {"skin": "brown", "hair_color": "red", "clothes": "jacket"}),
        ("dressed in red on blue", {"shirt": "red", "background": "blue"}),
        ("a clown nose and a red nose", {"accessory": "red nose"}),
    ],
)
def test_free_texts(text, named):
    if named is ValueError:
        with pytest.raises(ValueError, match="the flat style has no hair 'flat top'"):
            parse(text)
    else:
        assert parse(text) == named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a toon portrait with grean hair", "'grean' .* did you mean green"),
        ("blue", "what is blue. Say 'blue hair' or 'blue shirt' or 'blue background'"),
        ("orange hair", "hair color comes in black.*, not in orange"),
        ("laughing and sad", "two values of mood"),
        ("toon with sunglasses", "it has no accessory; sunglasses exists in jolly, flat, storybook, pixel"),
        ("bald with pink hair", "a bald head has no hair color"),
        ("stubble and a striped shirt", "no style has all of"),
    ],
)
def test_what_cannot_be_drawn_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_styles_for_named_values():
    assert styles_for({"mood": "hopeful"}) == ("doodle",)
    assert styles_for({"hair": "mohawk", "style": "toon"}) == ()


def test_naming_what_is_not_there_is_refused():
    bald = Portrait("inked", hair="bald", skin="tan", mood="sad", accessory="glasses", shirt="blue", background="pink")
    with pytest.raises(ValueError, match="has no hair_color to name"):
        prompt(bald, frozenset({"hair_color"}))
