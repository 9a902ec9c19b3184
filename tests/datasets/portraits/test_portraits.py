"""What a portrait is, its splits, and its exact picture."""

import dataclasses
import hashlib
import json
from collections import Counter

import pytest
import torch

from diffusion_opt.datasets import CorruptFileError, write_sums
from diffusion_opt.datasets.portraits import (
    ATTRIBUTES,
    HELD_OUT,
    STYLES,
    Portrait,
    allowed,
    compose,
    draw,
    draw_many,
    drawing,
    held_out_pairs,
    sample,
    split_of,
    svg_of,
)
from diffusion_opt.names import data_dir

BALD = Portrait("inked", hair="bald", skin="tan", mood="sad", accessory="glasses", shirt="blue", background="pink")


def test_composed_svg_equals_dicebear_byte_by_byte():
    """The checksums are those of DiceBear's own `createAvatar`, kept by tools/portraits/extract.mjs."""
    kept = json.loads((data_dir() / "portraits/sample.json").read_text())
    assert Counter(one["style"] for one in kept) == dict.fromkeys(STYLES, 12)
    for one in kept:
        svg = compose(one["style"], one["parts"], one["colors"])
        assert hashlib.sha256(svg.encode()).hexdigest() == one["sha256"], one


def test_no_mark_is_left_in_any_portrait():
    assert not [p for p in sample(150, 1) if "{" in svg_of(p)]


@pytest.mark.parametrize("style", STYLES)
def test_every_value_changes_the_picture(style):
    """Each value of each attribute gives a picture of its own: at least 0.2 % of the pixels differ from every other."""
    base = next(p for p in sample(200, 3) if p.style == style and p.hair_color not in (None, "black"))
    for name, values in ATTRIBUTES[style].items():
        colorless = {"hair_color": None}
        drawn = [draw(dataclasses.replace(base, **{name: v}, **(colorless if v == "bald" else {}))) for v in values]
        for i, one in enumerate(drawn):
            for j in range(i):
                share = ((one.int() - drawn[j].int()).abs().amax(0) > 24).float().mean().item()
                assert share > 0.002, f"{style} {name}: {values[j]} and {values[i]} differ in {share:.2%} of the pixels"


def test_pictures_are_exact_and_of_any_size():
    assert torch.equal(draw(BALD), draw(BALD))
    assert draw(BALD, 40).shape == (3, 40, 40)
    assert torch.equal(draw_many([BALD, sample(1, 0)[0]], 32)[0], draw(BALD, 32))
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        draw(BALD, 4)


def test_samples_are_uniform_within_each_style():
    """Counts of each value within five standard deviations of equal, in the train split."""
    portraits = sample(3500, 0)
    styles = Counter(p.style for p in portraits)
    for style in STYLES:
        assert abs(styles[style] - 500) < 5 * 500**0.5
        for name, values in allowed(style).items():
            counts = Counter(getattr(p, name) for p in portraits if p.style == style)
            counts.pop(None, None)  # bald heads
            mean = counts.total() / len(values)
            assert set(counts) == set(values)
            assert all(abs(n - mean) < 5 * mean**0.5 for n in counts.values()), (style, name, counts)


def test_splits_never_share_a_portrait():
    train, test, held = (sample(500, 0, split) for split in ("train", "test", "held_out"))
    assert not set(train) & set(test) and not (set(train) | set(test)) & set(held)
    assert not any(held_out_pairs(p) for p in train + test) and all(held_out_pairs(p) for p in held)
    assert {split_of(p) for p in test} == {"test"}
    assert {(p.style, name) for p in held for name in held_out_pairs(p)} == {
        (style, name) for style, pairs in HELD_OUT.items() for name in pairs
    }


def test_a_smaller_sample_begins_a_larger_one():
    assert sample(20, 4) == sample(30, 4)[:20]
    assert sample(20, 4) != sample(20, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "tooon"}, "did you mean toon"),
        ({"mood": "furious"}, "mood of the inked style must be one of smiling"),
        ({"hair": "bob"}, "hair_color of the inked style must be one of black"),
        ({"hair_color": "pink"}, "a bald head has no hair color"),
        ({"beard": "beard"}, "the inked style has no beard"),
    ],
)
def test_impossible_portraits_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BALD, **change)


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        sample(-1, 0)


def test_an_altered_file_of_parts_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "portraits"
    folder.mkdir()
    (folder / "parts.json.gz").write_bytes(b"no gzip")
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    drawing.styles.cache_clear()
    with pytest.raises(CorruptFileError, match="SHA256SUMS is missing"):
        draw(BALD)
    write_sums(folder)
    with pytest.raises(CorruptFileError, match="cannot be read"):
        draw(BALD)
    drawing.styles.cache_clear()
