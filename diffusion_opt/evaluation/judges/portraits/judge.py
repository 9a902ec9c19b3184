"""The judge that knows portraits exactly: what each picture shows, against what its prompt asked for and left open.

    portraits.named                 share of all named attributes (the style too) that are right; higher is better
    portraits.named_<attribute>     the same of one attribute
    portraits.all_named             share of pictures in which everything named is right
    portraits.open_variation        total variation of what prompts leave open, from uniform; lower is better, and
                                    `real` is what a perfect model of that many pictures gets (`variety.py`)
    portraits.open_variety          entropy of the same, over that of uniform; 1 is full variety
    portraits.nearest_is_asked      of prompts that name everything: the exact render of the asked portrait is nearer
                                    than all others asked for and all of `gallery` (`likeness.py`)
    portraits.psnr                  of the same pictures, against those renders, dB
    portraits.distance              FD in ImageNet features, if real pictures are given: `real` is its first floor
    portraits.autoencoder_distance  FD of real pictures after `autoencode`, the second floor: what no model before that
                                    autoencoder gets below

`prompts` are texts; `portraits.parse` says what they name. Attributes are read by a small network (`reader.py`). Its
own accuracy on unseen renders stands in the card of `data/features/portraits` and is the most that a named number can
show; with `settle=True` exact renders decide where it is unsure. Copies of training pictures: `likeness.copies`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffusion_opt.datasets.portraits import Portrait, draw_many, parse
from diffusion_opt.evaluation.distances import frechet_distance, moments
from diffusion_opt.evaluation.features import as_saved
from diffusion_opt.evaluation.judges.efficientnet import imagenet_features
from diffusion_opt.evaluation.judges.imagenet import reference_of
from diffusion_opt.evaluation.judges.judge import RESAMPLES, Number, Prompts, as_frames, mean_interval
from diffusion_opt.evaluation.judges.portraits.likeness import nearest_is_asked, own_distance
from diffusion_opt.evaluation.judges.portraits.reader import check_pictures, look
from diffusion_opt.evaluation.judges.portraits.settle import settled
from diffusion_opt.evaluation.judges.portraits.variety import Named, mean_variation, variety
from diffusion_opt.evaluation.judges.real import RealPictures

BASIS = "portrait reader"
Autoencode = Callable[[Tensor], Tensor]  # pictures (n, 3, 128, 128) in [-1, 1] -> decoded again


def named_by(prompts: Prompts) -> list[dict[str, str]]:
    """What each prompt names. Raises ValueError for class numbers and for words that are not about portraits."""
    texts = list(prompts)
    if wrong := [prompt for prompt in texts if not isinstance(prompt, str)]:
        raise ValueError(f"the portraits judge reads prompts, texts such as 'punk with green hair'; got {wrong[0]!r}")
    return [parse(text) for text in texts]


def whole_portrait(named: Named) -> Portrait | None:
    """The portrait of a prompt that names everything, else None."""
    try:
        return Portrait(**named)
    except (TypeError, ValueError):  # no style, or attributes missing
        return None


@dataclass(frozen=True, eq=False)
class PortraitsJudge:
    """See the module's head. `gallery`: more pictures that the asked one must beat, for example those of training."""

    gallery: UInt8[Tensor, "m 3 128 128"] | None = None
    autoencode: Autoencode | None = None
    settle: bool = False  # let exact renders decide where the reader is unsure (`settle.py`); slower
    resamples: int = RESAMPLES
    seed: int = 0

    name: ClassVar[str] = "portraits"
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raises ValueError as `measure` does."""
        check_pictures(as_frames(pictures))
        if len(named_by(prompts)) != len(pictures):
            raise ValueError(f"one prompt for each picture: got {len(prompts)} prompts for {len(pictures)} pictures")

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError for other than 128 x 128 color pictures, and for prompts that do not parse."""
        self.check(pictures, prompts, real)
        asked = named_by(prompts)
        frames = as_saved(as_frames(pictures).float())
        reading = look(frames)
        styles = [named.get("style") for named in asked]
        seen = settled(frames, reading, styles) if self.settle else reading.portraits(styles)
        found = self._named(asked, seen, reading.styles) | self._open(asked, seen) | self._whole(frames, asked)
        return found | (self._distances(frames, real) if real is not None else {})

    @property
    def basis(self) -> str:
        return f"{BASIS}, settled by renders" if self.settle else BASIS

    def _number(self, hits: Sequence[float], basis: str | None = None, real: float | None = None) -> Number:
        basis = basis or self.basis
        values = torch.tensor(hits, dtype=torch.float64)
        return Number(
            values.mean().item(), len(hits), basis, *mean_interval(values, self.seed, self.resamples), real=real
        )

    def _named(self, asked: list[dict[str, str]], seen: list[Portrait], styles: list[str]) -> dict[str, Number]:
        right: dict[str, list[float]] = defaultdict(list)
        whole = []
        for named, portrait, style in zip(asked, seen, styles, strict=True):
            hits = {k: float((style if k == "style" else getattr(portrait, k)) == v) for k, v in named.items()}
            for name, hit in hits.items():
                right[name].append(hit)
            if hits:
                whole.append(float(all(hits.values())))
        if not whole:
            return {}
        every = [hit for hits in right.values() for hit in hits]
        by_name = {f"portraits.named_{name}": self._number(hits) for name, hits in sorted(right.items())}
        return {"portraits.named": self._number(every), "portraits.all_named": self._number(whole), **by_name}

    def _open(self, asked: list[dict[str, str]], seen: list[Portrait]) -> dict[str, Number]:
        groups = variety(asked, seen, self.seed)
        if not groups:
            return {}
        variation, floor = mean_variation(groups)
        total = sum(group.pictures for group in groups)
        entropy = sum(group.entropy * group.pictures for group in groups) / total
        return {
            "portraits.open_variation": Number(variation, len(asked), self.basis, real=floor),
            "portraits.open_variety": Number(entropy, len(asked), self.basis),
        }

    def _whole(self, frames: Float[Tensor, "n 3 h w"], asked: list[dict[str, str]]) -> dict[str, Number]:
        whole = {row: portrait for row, named in enumerate(asked) if (portrait := whole_portrait(named))}
        if not whole:
            return {}
        portraits, pictures = list(whole.values()), frames[list(whole)]
        gallery = torch.empty(0, *frames.shape[1:], dtype=torch.uint8) if self.gallery is None else self.gallery
        basis = f"exact renders, gallery of {len(portraits) + len(gallery):,}"
        exact = draw_many(portraits, progress=False)
        psnr = 10 * torch.log10(4 / own_distance(pictures, exact).clamp_min(1e-6))
        won = nearest_is_asked(pictures, portraits, gallery)
        return {
            "portraits.nearest_is_asked": self._number(won.double().tolist(), basis, real=1.0),
            "portraits.psnr": self._number(psnr.tolist(), "exact renders"),
        }

    def _distances(self, frames: Float[Tensor, "n 3 h w"], real: RealPictures) -> dict[str, Number]:
        reference, num = reference_of(real), len(frames)

        def distance(pictures: Tensor) -> float:
            return frechet_distance(*moments(imagenet_features(pictures)), reference.mean, reference.cov).item()

        found = {
            "portraits.distance": Number(distance(frames), num, reference.basis, real=reference.floor(num)),
        }
        if self.autoencode is not None:
            decoded = self.autoencode(real.held_out[:num])
            found["portraits.autoencoder_distance"] = Number(
                distance(decoded), len(decoded), reference.basis, real=reference.floor(len(decoded))
            )
        return found
