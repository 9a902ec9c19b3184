"""Is a picture the one that was asked for, or a copy of one the model was trained on? Distances to exact renders.

Every portrait has one exact picture, so a prompt that names everything can be judged without any network: of a gallery
of pictures, the one nearest to the generated picture (mean square difference of pixels) should be the one asked for.
For combinations that were never trained this asks whether a model composes. A gallery of random portraits is the easy
test; that of `neighbors`, which differ from the asked one in a single attribute, is the strict one.

A copy check turns it around: where a prompt leaves much open or names what was never trained, a picture should not be
nearer to a training picture than other real pictures are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from diffusion_opt.datasets.portraits import ATTRIBUTES, Portrait, draw_many
from diffusion_opt.evaluation.judges.portraits.reader import check_pictures

BLOCK = 500  # gallery pictures compared at a time


def nearest(
    pictures: Float[Tensor, "n c h w"], gallery: UInt8[Tensor, "m c h w"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Mean square difference (in [-1, 1] units) to the nearest of a gallery, and its place there.

    The gallery may be mapped from a file: it is read in blocks.
    """
    flat = pictures.float().flatten(1)
    best = torch.full((len(flat),), torch.inf)
    place = torch.zeros(len(flat), dtype=torch.long)
    for start in range(0, len(gallery), BLOCK):
        part = gallery[start : start + BLOCK].float().flatten(1) / 127.5 - 1
        squares = torch.cdist(flat, part).square() / flat.shape[1]
        found, at = squares.min(1)
        closer = found < best
        best, place = torch.where(closer, found, best), torch.where(closer, at + start, place)
    return best, place


def own_distance(pictures: Float[Tensor, "n c h w"], exact: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean square difference of each picture to the exact render of what was asked."""
    return (pictures.float() - (exact.float() / 127.5 - 1)).square().flatten(1).mean(1)


def nearest_is_asked(
    pictures: Float[Tensor, "n 3 128 128"], portraits: Sequence[Portrait], gallery: UInt8[Tensor, "m 3 128 128"]
) -> Bool[Tensor, " n"]:
    """Whether no picture of the gallery, nor of the other portraits asked for, is nearer than the asked one's render.

    A gallery picture equal to the asked render is that render. Raises ValueError for unequal numbers and other sizes.
    """
    _check(pictures, portraits)
    exact = draw_many(portraits, progress=False)
    own = own_distance(pictures, exact)
    others = torch.minimum(nearest(pictures, gallery)[0], nearest(pictures, exact)[0])
    return own <= others + 1e-6  # cdist and a direct sum differ in the last digits


def neighbors(portrait: Portrait) -> list[Portrait]:
    """All portraits that differ from this one in exactly one attribute other than the style."""
    found = []
    for name, value in portrait.attributes().items():
        for other in ATTRIBUTES[portrait.style][name]:
            if other != value and not (name == "hair" and other == "bald"):
                color = {"hair_color": "black"} if portrait.hair == "bald" and name == "hair" else {}
                found.append(replace(portrait, **{name: other}, **color))
    return found


def nearest_among_neighbors(
    pictures: Float[Tensor, "n 3 128 128"], portraits: Sequence[Portrait]
) -> Bool[Tensor, " n"]:
    """The strict test: the asked render is nearer than that of every portrait that differs in one attribute.

    Draws about forty pictures for each one judged, a third of a second.
    """
    _check(pictures, portraits)
    won = []
    for picture, portrait in zip(pictures, portraits, strict=True):
        renders = draw_many([portrait, *neighbors(portrait)], progress=False)
        won.append(own_distance(picture.expand(len(renders), -1, -1, -1), renders).argmin().item() == 0)
    return torch.tensor(won)


@dataclass(frozen=True, slots=True)
class Copies:
    """How near pictures lie to training pictures, beside how near real unseen ones do."""

    share: float  # of pictures nearer to a training picture than the nearest 5 % of real unseen pictures are
    expected: float  # the same of other real unseen pictures
    deviation: float  # standard deviation of the share of real pictures, by the number of both
    median: float  # mean square difference to the nearest training picture
    real_median: float

    @property
    def is_copying(self) -> bool:
        """Three standard deviations more than real unseen pictures give."""
        return self.share > self.expected + 3 * self.deviation


def copies(
    pictures: Float[Tensor, "n c h w"], training: UInt8[Tensor, "m c h w"], unseen: Float[Tensor, "k c h w"]
) -> Copies:
    """Compare distances to the nearest training picture: of these pictures, and of real ones that are not in training.

    `unseen` should come through the same autoencoder as the pictures where there is one: what it blurs away makes
    everything lie farther from training pictures. Raises ValueError for fewer than 20 unseen pictures.
    """
    if len(unseen) < 20:
        raise ValueError(f"a quantile of 5 % needs at least 20 unseen real pictures, better 200; got {len(unseen)}")
    mine, theirs = nearest(pictures, training)[0], nearest(unseen, training)[0]
    rank = round(len(unseen) / 20)  # a real picture lies below the k-th of m others with a chance of k / (m + 1)
    expected = rank / (len(unseen) + 1)
    share = (mine < theirs.sort().values[rank - 1]).double().mean().item()
    deviation = (expected * (1 - expected) * (1 / len(pictures) + 1 / len(unseen))) ** 0.5
    return Copies(share, expected, deviation, mine.median().item(), theirs.median().item())


def _check(pictures: Tensor, portraits: Sequence[Portrait]) -> None:
    check_pictures(pictures)
    if len(pictures) != len(portraits):
        raise ValueError(f"one portrait for each picture: got {len(portraits)} for {len(pictures)} pictures")
