"""The exact judge: right on exact renders, and lower on pictures that are wrong, poor or copied."""

import dataclasses

import pytest
import torch

from diffusion_opt.datasets.portraits import allowed, draw, draw_many, parse, sample
from diffusion_opt.evaluation.judges import Number, PortraitsJudge, RealPictures, judge_named, judged
from diffusion_opt.evaluation.judges.portraits import (
    copies,
    look,
    mean_variation,
    nearest_among_neighbors,
    nearest_is_asked,
    neighbors,
    open_choices,
    settled,
    variety,
)
from diffusion_opt.evaluation.judges.portraits.degrade import PatchComponents, blur


def test_exact_renders_are_read_right(drawn):
    found = judged(["portraits"], drawn.pictures, drawn.everything, resamples=20)
    assert found["portraits.named"].value > 0.97
    assert found["portraits.named_style"].value == 1
    assert found["portraits.nearest_is_asked"].value == 1
    assert found["portraits.psnr"].value > 50
    assert "portraits.open_variation" not in found  # nothing is left open
    number = found["portraits.named_hair"]
    assert number.low <= number.value <= number.high and number.num == len(drawn.portraits)
    assert Number(**number.to_dict()) == number


def test_renders_settle_what_the_reader_leaves_open(drawn):
    """On exact renders the two likeliest values decide by their pictures: more is right, and never less."""
    read = judged(["portraits"], drawn.pictures, drawn.partly, resamples=5)
    found = PortraitsJudge(settle=True, resamples=5).measure(drawn.pictures, drawn.partly)
    assert found["portraits.named"].value >= max(read["portraits.named"].value, 0.985)
    assert found["portraits.named"].basis != read["portraits.named"].basis  # `ratio` refuses to compare the two
    with pytest.raises(ValueError, match="the reading is of 60 pictures, got 2"):
        settled(drawn.pictures[:2], look(drawn.pictures))


def test_wrong_pictures_fall(drawn):
    """Pictures of other prompts: named attributes fall to chance, and none is the one that was asked."""
    found = judged(["portraits"], drawn.pictures.roll(1, 0), drawn.everything, resamples=20)
    assert found["portraits.named"].value < 0.45
    assert found["portraits.nearest_is_asked"].value < 0.05
    assert found["portraits.psnr"].value < 20


def test_one_wrong_attribute_is_told(drawn):
    """Backgrounds alone are changed, and only their number falls."""
    changed = [dataclasses.replace(p, background="green") for p in drawn.portraits]
    found = judged(["portraits"], draw_many(changed).float() / 127.5 - 1, drawn.everything, resamples=5)
    right = sum(p.background == "green" for p in drawn.portraits) / len(drawn.portraits)
    assert abs(found["portraits.named_background"].value - right) < 0.04
    assert found["portraits.named_hair_color"].value > 0.97


def test_blur_lowers_the_numbers_in_order(drawn):
    values = [
        judged(["portraits"], blur(drawn.pictures, sigma), drawn.everything, resamples=5)["portraits.psnr"].value
        for sigma in (0, 1, 3)
    ]
    assert values[0] > values[1] > values[2]


def test_reader_sees_through_a_linear_autoencoder(drawn):
    components = PatchComponents.of(drawn.pictures[::4])
    decoded = components.keep(drawn.pictures, [16] * len(drawn.pictures))
    assert (decoded - drawn.pictures).square().mean() > 1e-3  # it does lose detail
    found = judged(["portraits"], decoded, drawn.everything, resamples=5)
    assert found["portraits.named"].value > 0.95


def test_style_may_be_given_or_read(drawn):
    styles = [p.style for p in drawn.portraits]
    reading = look(drawn.pictures)
    assert reading.styles == styles
    assert {p.style for p in reading.portraits(["pixel"] * len(styles))} == {"pixel"}
    with pytest.raises(ValueError, match="one style for each picture"):
        reading.portraits(["pixel"])


def test_real_portraits_are_as_varied_as_they_should_be():
    """Portraits whose prompts leave things open: their total variation is that of a perfect model."""
    portraits = sample(1500, 9)
    asked = [{"style": p.style, "skin": p.skin} for p in portraits]
    real, floor = mean_variation(variety(asked, portraits))
    assert abs(real - floor) < 0.01
    same = [dataclasses.replace(p, background="pink", mood="smiling") for p in portraits]
    groups = {(g.style, g.attribute): g for g in variety(asked, same)}
    assert groups["toon", "mood"].variation == pytest.approx(0.8, abs=1e-6) and groups["toon", "mood"].entropy == 0
    assert groups["toon", "hair"].variation < groups["toon", "hair"].high + 0.05


def test_half_the_variety_shows():
    """A model that draws half of the backgrounds has a total variation of one half above nothing."""
    portraits = [p for p in sample(2000, 3) if p.style == "toon" and p.background in ("blue", "pink", "orange")]
    (group,) = (g for g in variety([{"style": "toon"}] * len(portraits), portraits) if g.attribute == "background")
    assert group.variation == pytest.approx(0.5, abs=0.06) and group.above_floor > 0.4
    assert set(group.observed) == set(allowed("toon")["background"])


@pytest.mark.parametrize(
    ("text", "name", "choices"),
    [
        ("inked portrait, pink hair", "hair", ("quiff", "mohawk", "fringe", "long", "bob")),
        ("inked portrait", "hair", ("quiff", "mohawk", "bald", "fringe", "long", "bob")),
        ("inked portrait, bald", "hair_color", None),
        ("toon portrait", "shirt", ("red", "blue", "green", "purple", "black")),
        ("pink hair", "hair", None),
    ],
)
def test_open_choices(text, name, choices):
    assert open_choices(parse(text)).get(name) == choices


def test_neighbors_differ_in_one_attribute(drawn):
    portrait = drawn.portraits[0]
    near = neighbors(portrait)
    assert len(set(near)) == len(near) > 20
    for other in near:
        changed = [n for n in dataclasses.asdict(portrait) if getattr(other, n) != getattr(portrait, n)]
        assert len(changed) == 1 or portrait.hair == "bald"


def test_the_strict_gallery_tells_one_attribute(drawn):
    asked = drawn.portraits[:2]
    near = [neighbors(p)[-1] for p in asked]
    assert nearest_among_neighbors(drawn.pictures[:2], asked).all()
    assert not nearest_among_neighbors(draw_many(near).float() / 127.5 - 1, asked).any()


def test_a_gallery_that_holds_a_nearer_picture_wins(drawn):
    asked, pictures = drawn.portraits[:8], drawn.pictures[:8]
    other = draw(neighbors(asked[0])[0])[None]
    mixed = torch.cat([other.float() / 127.5 - 1, pictures[1:]])
    assert nearest_is_asked(mixed, asked, drawn.pixels[20:]).all()
    assert nearest_is_asked(mixed, asked, other).tolist() == [False] + [True] * 7


def test_copies_are_found(drawn):
    """Training pictures with faint noise are copies; unseen renders are not."""
    training, unseen = drawn.pixels[:15], drawn.pictures[15:40]
    noisy = drawn.pictures[:15] + 0.01 * torch.randn(15, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert copies(noisy, training, unseen).is_copying
    assert copies(noisy, training, unseen).share == 1
    assert not copies(drawn.pictures[40:], training, unseen).is_copying
    with pytest.raises(ValueError, match="at least 20 unseen"):
        copies(noisy, training, unseen[:5])


def test_two_floors_of_the_distance(drawn):
    """What an autoencoder loses is a floor of its own, above that of as many real pictures."""
    components = PatchComponents.of(drawn.pictures[::4])
    judge = PortraitsJudge(autoencode=lambda x: components.keep(x, [8] * len(x)), resamples=2)
    real = RealPictures.of(drawn.pictures)
    found = judge.measure(real.held_out[:16], drawn.partly[:16], real=real)
    floor, second = found["portraits.distance"].real, found["portraits.autoencoder_distance"].value
    assert found["portraits.distance"].value == pytest.approx(floor, rel=0.5)
    assert second > 1.5 * floor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, p: (x[..., :64, :64], p), r"portraits are \(n, 3, 128, 128\)"),
        (lambda x, p: (x, p[:-1]), "one prompt for each picture"),
        (lambda x, p: (x, ["a cat", *p[1:]]), "'cat' .* is not a word for portraits"),
        (lambda x, p: (x, [3, *p[1:]]), "reads prompts, texts such as"),
        (lambda x, p: (x * torch.nan, p), "NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(drawn, change, message):
    pictures, prompts = change(drawn.pictures[:4], drawn.partly[:4])
    with pytest.raises(ValueError, match=message):
        judge_named("portraits").measure(pictures, prompts)
