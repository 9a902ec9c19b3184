"""The judge that knows the data: a small classifier of Fashion-MNIST, trained here, see `features.py` and `quality.py`.

    fashion.distance         FD (fashion features), with a bootstrap interval and what as many real pictures get
    fashion.kernel_distance  KID in the same features
    fashion.precision, fashion.recall, fashion.class_agreement

It sees whether a picture shows what was asked, in the variety that real pictures have. It is blind to what does not
matter for telling clothes apart: it was trained with faint noise on its pictures, precisely so that it would not care,
and pools to 2x2 before the features. Grain over a whole picture hardly moves it: a 1-step student whose grain anybody
sees came out better than its own teacher. So its verdict needs a second judge (`claim.at_teacher_quality`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_opt.datasets import FASHION_CLASSES
from diffusion_opt.evaluation.judges.judge import RESAMPLES, Number, Prompts, as_frames
from diffusion_opt.evaluation.judges.real import RealPictures
from diffusion_opt.evaluation.quality import Quality, features_for, quality


def class_numbers(prompts: Prompts) -> Tensor:
    """Class numbers (n,) from numbers or names. Raises ValueError for a name that is no class."""
    given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if unknown := [prompt for prompt in given if isinstance(prompt, str) and prompt not in FASHION_CLASSES]:
        raise ValueError(
            f"the fashion judge knows {', '.join(FASHION_CLASSES)}, not {unknown[0]!r}: judge with 'imagenet', "
            "'statistics' or 'paired'"
        )
    return torch.tensor([FASHION_CLASSES.index(prompt) if isinstance(prompt, str) else prompt for prompt in given])


def numbers_of(found: Quality) -> dict[str, Number]:
    """The record of `quality` as a judge's numbers."""
    basis = f"{found.features} classifier against {found.reference}"

    def number(value: float, *interval: float, real: float | None = None) -> Number:
        return Number(value, found.num_samples, basis, *interval, real=real)

    spread = 2 * found.kernel_deviation
    kernel = found.kernel_distance
    return {
        "fashion.distance": number(found.distance, found.distance_low, found.distance_high, real=found.floor),
        "fashion.kernel_distance": number(kernel, kernel - spread, kernel + spread),
        "fashion.precision": number(found.precision),
        "fashion.recall": number(found.recall),
        "fashion.class_agreement": number(found.class_agreement),
    }


@dataclass(frozen=True, slots=True)
class FashionJudge:
    """See the module's head. Its real pictures are always the shipped test images."""

    resamples: int = RESAMPLES
    seed: int = 0

    name: ClassVar[str] = "fashion"
    needs: ClassVar[frozenset[str]] = frozenset()

    def quality(self, pictures: Tensor, prompts: Prompts, teacher: Tensor | None = None) -> Quality:
        """The full record, with the gap to the teacher's pictures if they are given."""
        labels = class_numbers(prompts)
        return quality(as_frames(pictures), labels, teacher_images=teacher, resamples=self.resamples, seed=self.seed)

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raises ValueError as `measure` does."""
        features_for(as_frames(pictures))
        class_numbers(prompts)

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError for pictures other than gray ones of 28x28 or 16x16 pixels, and for unknown classes."""
        return numbers_of(self.quality(pictures, prompts))
