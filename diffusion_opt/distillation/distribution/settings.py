"""What may be changed of a method that matches distributions, as one frozen dataclass for each kind.

A `Method` carries one of these as its defaults, `--set name=value` changes it, a plan records it, and the builders in
`builders.py` hand it to the `Distiller`, whose fields have the same names.
"""

from dataclasses import dataclass, field
from typing import Any

from diffusion_opt.distillation.distribution.adversarial import GanSettings
from diffusion_opt.distillation.distribution.f_divergence import RatioBins


@dataclass(frozen=True, slots=True)
class MatchSettings:
    """The rollout and its critic, see `StudentRollout`."""

    warmup: int = 50  # updates of the critic before the first of the student
    fake_rate: float = 2.0  # learning rate of the critic over the student's
    t_min: float = 0.02  # noise levels at which student and teacher are compared
    t_max: float = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1 or self.fake_rate <= 0:
            raise ValueError(f"0 <= t_min < t_max <= 1 and a positive fake_rate are needed, got {self}")

    def options(self) -> dict[str, Any]:
        """The fields that the `Distiller` has too."""
        return {name: getattr(self, name) for name in ("warmup", "fake_rate", "t_min", "t_max")}


@dataclass(frozen=True, slots=True)
class HeadSettings(MatchSettings):
    """The same with a GAN head on the fake score, and a divergence that it makes possible."""

    divergence: str = "reverse_kl"
    gan: GanSettings = field(default_factory=GanSettings)
    head_rate: float = 1.0  # learning rate of the head over the fake score's
    ratio_bins: int = 0  # parts of time in which the ratio is taken relative to its mean; 0: not

    def options(self) -> dict[str, Any]:
        bins = RatioBins(self.ratio_bins, self.t_min, self.t_max) if self.ratio_bins else None
        own = {"divergence": self.divergence, "gan": self.gan, "head_rate": self.head_rate, "bins": bins}
        return MatchSettings.options(self) | own


@dataclass(frozen=True, slots=True)
class IdentitySettings(MatchSettings):
    """Score identity distillation; `gan` counts where it has a head (SiDA)."""

    alpha: float = 1.0
    gan: GanSettings = field(default_factory=GanSettings)
    head_rate: float = 1.0

    def options(self) -> dict[str, Any]:
        return MatchSettings.options(self) | {"alpha": self.alpha, "gan": self.gan, "head_rate": self.head_rate}


@dataclass(frozen=True, slots=True)
class AdversarialSettings(MatchSettings):
    """A discriminator alone."""

    gan: GanSettings = field(default_factory=lambda: GanSettings(1.0, 1.0, 1.0))

    def options(self) -> dict[str, Any]:
        return MatchSettings.options(self) | {"gan": self.gan}
