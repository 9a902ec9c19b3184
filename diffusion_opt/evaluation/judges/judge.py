"""What a judge is: something that looks at generated pictures and answers with named numbers.

One judge is not enough. A network trained on the very pictures sees classes and shapes well and can miss what a glance
sees, a grain over a whole picture; a student can even be better than its teacher there and look worse. So a judge has a
name, several judge in one run, and each number carries its judge's name:

    measure(pictures, prompts, real=…, teacher=…) -> {"imagenet.distance": Number(…), "imagenet.recall": Number(…), …}

`pictures` are (n, channels, height, width) in [-1, 1], or clips (n, frames, channels, height, width) that are judged
frame by frame. `prompts` say what was asked: texts, class names or class numbers, one for each. `real` are real
pictures (`real.RealPictures`), `teacher` the teacher's pictures from the same noise. A judge that needs one of the two
says so in `needs`, and raises ValueError without it.

A `Number` holds its 95 % interval, what as many real pictures get from the same judge, the sample count, and the basis:
network, reference and preprocessing. `ratio` refuses two numbers whose counts or bases differ.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.evaluation.distances import bootstrap_interval
from diffusion_opt.evaluation.judges.real import RealPictures

Prompts = Sequence[str | int] | Int[Tensor, " n"]
RESAMPLES = 200
STRATUM = 5  # samples of the rarest prompt from which on resamples are drawn within each prompt


@dataclass(frozen=True, slots=True)
class Number:
    """One figure of a judge; lower or higher is better as the judge's essay says."""

    value: float
    num: int  # pictures (or frames) behind it
    basis: str  # network and reference; numbers of different bases do not compare
    low: float | None = None  # 95 % interval
    high: float | None = None
    real: float | None = None  # what `num` real pictures get; None if not so many are at hand

    @property
    def above_real(self) -> float:
        """The value less that of real pictures: what is the model's and not the sample count's.

        Raises ValueError if that of real pictures is unknown.
        """
        if self.real is None:
            raise ValueError(f"what {self.num:,} real pictures get is not known; hand over at least twice as many")
        return self.value - self.real

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Number(**stored)` is the inverse."""
        return asdict(self)


class Judge(Protocol):
    """Anything with a name and an opinion. Numbers are named "<judge>.<number>"."""

    name: str
    needs: frozenset[str]  # of "real", "teacher"

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raise ValueError if such pictures cannot be judged: asked on a first batch, before the others are made."""
        ...

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """The numbers of these pictures. Raises ValueError for what it needs and does not get, or cannot judge."""
        ...


def ratio(number: Number, baseline: Number) -> float:
    """How many times the baseline's value this one is.

    Raises ValueError naming the first thing in which the two were measured differently.
    """
    for field in ("num", "basis"):
        mine, theirs = getattr(number, field), getattr(baseline, field)
        if mine != theirs:
            raise ValueError(
                f"numbers compare only under one protocol: {field} is {mine!r} here and {theirs!r} in the baseline; "
                "measure both again with the same"
            )
    return number.value / baseline.value


def as_frames(pictures: Tensor) -> Float[Tensor, "m c h w"]:
    """Pictures as they are, clips (n, frames, c, h, w) as n * frames pictures.

    Raises ValueError for another shape, for other than 1 or 3 channels, for fewer than 2 and for values not finite.
    """
    if pictures.ndim not in (4, 5) or pictures.shape[-3] not in (1, 3):
        raise ValueError(
            f"judges see pictures (n, channels, height, width) or clips (n, frames, channels, height, width) of 1 or 3 "
            f"channels, got a tensor of shape {tuple(pictures.shape)}"
        )
    frames = pictures.flatten(0, 1) if pictures.ndim == 5 else pictures
    if len(frames) < 2:
        raise ValueError(f"a judge compares distributions and needs at least 2 pictures, got {len(frames)}")
    if not frames.isfinite().all():
        bad = int((~frames.flatten(1).isfinite().all(1)).sum())
        raise ValueError(f"{bad} of {len(frames)} pictures hold NaN or infinity; the sampler diverged")
    return frames


def strata(prompts: Prompts, pictures: Tensor) -> Int[Tensor, " m"]:
    """A number for each frame that is the same where the prompt is; all 0 if prompts hardly repeat.

    How many samples a prompt gets is set by us, so a resample draws within prompts; with one picture of each it could
    draw nothing else than that picture. Raises ValueError if there is not one prompt for each picture or clip.
    """
    given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if len(given) != len(pictures):
        raise ValueError(f"one prompt for each picture: got {len(given)} prompts for {len(pictures)} pictures")
    order = {prompt: index for index, prompt in enumerate(dict.fromkeys(given))}
    numbers = torch.tensor([order[prompt] for prompt in given])
    if numbers.bincount().min() < STRATUM:
        numbers = torch.zeros_like(numbers)
    return numbers.repeat_interleave(pictures.shape[1]) if pictures.ndim == 5 else numbers


def mean_interval(values: Float[Tensor, " n"], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over samples; values below 0 are possible."""
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values.double()[draws].mean(1)
    shift = float(values.double().min()) - 1  # `bootstrap_interval` ends at 0, which a mean need not
    low, high = bootstrap_interval(float(values.double().mean()) - shift, means - shift)
    return low + shift, high + shift
