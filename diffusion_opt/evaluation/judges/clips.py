"""The judge that knows the world of clips exactly (`datasets.clips`): it finds the picture and compares with the law.

    clips.position_error  px   from the true path up to its first hit, if the truth is given
    clips.physics         px   from where the law leads in one frame
    clips.action               share of chunks that the asked action explains best
    clips.identity             share of frames away from walls that show the picture of the frame before
    clips.turned               share of hits at which the picture turned into another
    clips.turns                chi^2 per degree of freedom of which one it became; 1 is uniform
    clips.turns_p              probability of so large a chi^2 by chance; below 0.01 the draws are not uniform
    clips.clearness            share of what differs from the scene that the picture explains; mixed pictures lower it
    clips.opacity              1 is as drawn; faded pictures lower it
    clips.background      dB   peak signal to noise of the mean over time where no picture is
    clips.drift           1/255   change there from the first to the last quarter
    clips.flicker         1/255   change there from frame to frame
    clips.distance             Fréchet distance of 64 colors and edges to real frames

Each has a bootstrap interval over clips, and what as many real clips get, which is made on the spot: real clips cost
nothing here. With an autoencoder (`codec`, clips to clips) the same numbers of real clips that went through it stand
beside, "clips.codec.physics" and so on: no model of its latents can do better.

Prompts are those of the clips, "frog, beach: left left none"; the action of each chunk is what a stream was steered by.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.datasets.clips import CHUNK, PICTURES, SIZE, Clips, Motion, clips, parse
from diffusion_opt.evaluation.distances import bootstrap_frechet, bootstrap_interval, frechet_distance, moments
from diffusion_opt.evaluation.judges.clip_measures import Moved, appearance, moved, still
from diffusion_opt.evaluation.judges.clip_tracking import Track, track
from diffusion_opt.evaluation.judges.judge import RESAMPLES, Number, Prompts, as_frames
from diffusion_opt.evaluation.judges.real import RealPictures

REFERENCE, EVERY = 192, 4  # real clips behind the distance, and one frame in so many
SEEDS = {"reference": 900_001, "real": 900_002}  # of real clips; no run of ours trains on them
BEST = 1e-8  # mean square error that counts as none (86 dB)


@cache
def _reference(num_chunks: int) -> tuple[Tensor, Tensor]:
    frames = clips(REFERENCE, num_chunks, SEEDS["reference"], "test").frames[:, ::EVERY]
    return moments(appearance(frames.flatten(0, 1)))


def _real(num: int, num_chunks: int) -> Clips:
    """Real clips, at least as many frames as a split needs."""
    made = clips(num, max(num_chunks, 3), SEEDS["real"], "test")
    cut = CHUNK * num_chunks
    motion = Motion(*(getattr(made.motion, one.name)[:, :cut] for one in fields(Motion)))
    return Clips(made.frames[:, :cut], made.scenes, made.actions[:, :num_chunks], motion)


@cache
def _floor(num: int, num_chunks: int, skip: int) -> dict[str, float]:
    """What as many real clips get."""
    like = _real(num, num_chunks)
    values = ClipsJudge(skip, like, resamples=2)._values(like.frames, like.scenes, like.actions, like)
    return {name: value for name, (value, *_) in values.items()}


def chi_square(turns: Int[Tensor, " m"]) -> tuple[float, float]:
    """chi^2 per degree of freedom of which picture a turn led to, and its probability; NaN with under 5 of each."""
    counts = turns[turns > 0].bincount(minlength=len(PICTURES))[1:].double()
    degrees = len(counts) - 1
    if counts.sum() < 5 * len(counts):
        return float("nan"), float("nan")
    expected = counts.sum() / len(counts)
    value = ((counts - expected).square() / expected).sum()
    probability = torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), value / 2)
    return value.item() / degrees, probability.item()


@dataclass(frozen=True, eq=False)
class ClipsJudge:
    """See the module's head. `skip` frames at the start were given and are not judged."""

    skip: int = 0
    truth: Clips | None = field(default=None, repr=False)  # the real clips that these go on from
    codec: Callable[[Tensor], Tensor] | None = None
    resamples: int = RESAMPLES
    seed: int = 0

    name: ClassVar[str] = "clips"
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None = None) -> None:
        """Raises ValueError for other clips than (n, frames, 3, 64, 64), a prompt too short, or another truth."""
        as_frames(pictures)
        if pictures.ndim != 5 or pictures.shape[2:] != (3, SIZE, SIZE) or pictures.shape[1] % CHUNK:
            raise ValueError(
                f"the judge of clips sees clips (n, frames, 3, {SIZE}, {SIZE}) of an even number of frames, got "
                f"{tuple(pictures.shape)}"
            )
        if len(prompts) != len(pictures):
            raise ValueError(f"one prompt for each clip: got {len(prompts)} prompts for {len(pictures)} clips")
        if self.skip % CHUNK or not 0 <= self.skip <= pictures.shape[1] - 2 * CHUNK:
            raise ValueError(f"skip must be an even number that leaves 4 frames or more, got {self.skip}")
        needed = pictures.shape[1] // CHUNK
        for text in prompts:
            if (given := len(parse(str(text))[2])) < needed:
                raise ValueError(f"{pictures.shape[1]} frames need {needed} actions, {text!r} has {given}")
        if self.truth is not None and self.truth.frames.shape != pictures.shape:
            raise ValueError(
                f"the truth has shape {tuple(self.truth.frames.shape)}, the clips {tuple(pictures.shape)}: give the "
                "clips that these go on from, cut to as many frames"
            )

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError as `check` does. Real clips are always made anew; `real` and `teacher` are not needed."""
        self.check(pictures, prompts, real)
        asked = [parse(str(text)) for text in prompts]
        scenes = torch.tensor([scene for _, scene, _ in asked])
        num_chunks = pictures.shape[1] // CHUNK
        actions = torch.tensor([row[:num_chunks] for *_, row in asked])
        floor = _floor(len(pictures), num_chunks, self.skip)
        found = self._numbers(pictures, scenes, actions, floor, "")
        if self.codec is not None:
            like = _real(len(pictures), num_chunks)
            found |= self._numbers(self.codec(like.frames), like.scenes, like.actions, floor, "codec.")
        return found

    def _numbers(
        self, frames: Tensor, scenes: Tensor, actions: Tensor, floor: dict[str, float], prefix: str
    ) -> dict[str, Number]:
        truth = None if prefix else self.truth
        basis = f"{frames.shape[1]} frames, the first {self.skip} given"
        values = self._values(frames, scenes, actions, truth)
        return {
            f"clips.{prefix}{name}": Number(value, len(frames), basis, low, high, floor.get(name))
            for name, (value, low, high) in values.items()
        }

    def _values(
        self, frames: Tensor, scenes: Tensor, actions: Tensor, truth: Clips | None
    ) -> dict[str, tuple[float, float | None, float | None]]:
        """Each figure with its interval. Tracked from the first frame; judged after the given ones."""
        found = track(frames, scenes)
        motion, pixels = moved(found, actions), still(*_later(frames, scenes, found.positions, self.skip))
        late, late_chunks = slice(self.skip, None), slice(self.skip // CHUNK, None)
        values = {
            "physics": self._mean(motion.physics[:, late]),
            "action": self._mean(motion.action[:, late_chunks]),
            "identity": self._mean(motion.identity[:, late]),
            "turned": self._mean(motion.turned[:, late]),
            **self._turns(motion, late),
            "clearness": self._mean(found.clearness[:, late]),
            "opacity": self._mean(found.opacity[:, late]),
            "background": self._decibels(pixels.background),
            "drift": self._mean(pixels.drift[:, None]),
            "flicker": self._mean(pixels.flicker[:, None]),
            "distance": self._distance(frames[:, late]),
        }
        if truth is not None:
            values["position_error"] = self._mean(self._off_path(found, truth)[:, late])
        return values

    def _off_path(self, found: Track, truth: Clips) -> Float[Tensor, "n f"]:
        """Pixels from the true path; NaN from its first judged hit on, since chance decides there."""
        hits = truth.motion.hits.clone()
        hits[:, : self.skip] = False
        error = (found.positions - truth.motion.positions).norm(dim=-1)
        return torch.where(hits.cummax(1).values, torch.nan, error)

    def _draws(self, num: int) -> Int[Tensor, "r n"]:
        return torch.randint(num, (self.resamples, num), generator=torch.Generator().manual_seed(self.seed))

    def _mean(self, values: Float[Tensor, "n m"]) -> tuple[float, float, float]:
        """Mean over all that is known, and its interval from resampled clips (ratio of sums)."""
        known = ~values.isnan()
        sums, counts = torch.where(known, values, 0.0).double().sum(1), known.double().sum(1)
        draws = self._draws(len(values))
        means = sums[draws].sum(1) / counts[draws].sum(1)
        low, high = torch.nanquantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        return (sums.sum() / counts.sum()).item(), low, high

    def _decibels(self, errors: Float[Tensor, " n"]) -> tuple[float, float, float]:
        value, low, high = self._mean(errors[:, None])
        to_db = lambda error: (10 * torch.log10(4 / torch.tensor(error).clamp(min=BEST))).item()  # noqa: E731
        return to_db(value), to_db(high), to_db(low)

    def _turns(self, motion: Moved, late: slice) -> dict[str, tuple[float, float | None, float | None]]:
        value, probability = chi_square(motion.turns[:, late].flatten())
        rows = motion.turns[:, late]
        resampled = torch.tensor([chi_square(rows[draw].flatten())[0] for draw in self._draws(len(rows))])
        spread = torch.nanquantile(resampled - resampled.nanmean(), torch.tensor([0.025, 0.975])).tolist()
        return {"turns": (value, value + spread[0], value + spread[1]), "turns_p": (probability, None, None)}

    def _distance(self, frames: Tensor) -> tuple[float, float, float]:
        mean, cov = _reference(max(3, frames.shape[1] // CHUNK))
        features = torch.stack([appearance(clip) for clip in frames[:, ::EVERY]])
        per_clip, num = features.shape[1], len(features)
        counts = torch.stack([draw.bincount(minlength=num) for draw in self._draws(num)]).double()
        flat = features.flatten(0, 1)
        value = frechet_distance(*moments(flat), mean, cov).item()
        resampled = bootstrap_frechet(flat, counts.repeat_interleave(per_clip, 1), mean, cov)
        return value, *bootstrap_interval(value, resampled)


def _later(frames: Tensor, scenes: Tensor, positions: Tensor, skip: int) -> tuple[Tensor, Tensor, Tensor]:
    return frames[:, skip:], scenes, positions[:, skip:]
