"""Plain statistics that a glance sees: how much fine detail pictures have, against real ones. 1 is right.

    statistics.high_frequency   power at a quarter cycle a pixel and above, over that of real pictures
    statistics.total_variation  mean absolute difference of neighboring pixels, over that of real pictures

Above 1 pictures are grainy or over-sharp, below 1 they are smooth. The two differ where detail does: power counts
strong edges, total variation counts faint speckles too, since it is not squared. No network is involved, so nothing can
be trained to please it unseen, and it says nothing of what a picture shows. Without real pictures the teacher's are the
measure, and the basis says so.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_opt.evaluation.features import as_saved
from diffusion_opt.evaluation.judges.judge import RESAMPLES, Number, Prompts, as_frames, mean_interval
from diffusion_opt.evaluation.judges.real import RealPictures

HIGH = 0.25  # cycles per pixel; the finest grid can carry 0.5


def high_frequencies(height: int, width: int) -> Bool[Tensor, "h w"]:
    """Where the frequencies of a two-dimensional Fourier transform are high."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]) >= HIGH


def high_frequency_power(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean power of a picture per pixel and channel that lies at high frequencies."""
    spectrum = torch.fft.fft2(as_saved(pictures).double(), norm="forward").abs().square()
    return (spectrum * high_frequencies(*pictures.shape[-2:])).sum((-1, -2)).mean(1)


def total_variation(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean |difference| of horizontal neighbors plus that of vertical neighbors (Rudin, Osher, Fatemi 1992)."""
    saved = as_saved(pictures).double()
    return sum(saved.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (-1, -2))


STATISTICS = {"high_frequency": high_frequency_power, "total_variation": total_variation}


@dataclass(frozen=True, slots=True)
class StatisticsJudge:
    """See the module's head."""

    resamples: int = RESAMPLES
    seed: int = 0

    name: ClassVar[str] = "statistics"
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raises ValueError if real pictures are of another shape."""
        frames = as_frames(pictures)
        if real is not None and real.pictures.shape[1:] != frames.shape[1:]:
            raise ValueError(
                f"statistics compare pixels: pictures are {tuple(frames.shape[1:])}, real ones "
                f"{tuple(real.pictures.shape[1:])}; resize those (RealPictures.of(folder, size=…))"
            )

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError with neither real nor the teacher's pictures, or if their shape is another."""
        if real is None and teacher is None:
            raise ValueError("statistics are relative to real pictures or to the teacher's: pass real= or teacher=")
        self.check(pictures, prompts, real)
        frames, measure = as_frames(pictures), as_frames(teacher) if real is None else real.pictures
        basis = f"against {real.name} {real.fingerprint[:12]}" if real is not None else "against the teacher"
        found = {}
        for name, statistic in STATISTICS.items():
            scale = statistic(measure).mean()
            values = statistic(frames) / scale
            low, high = mean_interval(values, self.seed, self.resamples)
            held_out = None if real is None else (statistic(real.held_out).mean() / scale).item()
            found[f"statistics.{name}"] = Number(values.mean().item(), len(frames), basis, low, high, held_out)
        return found
