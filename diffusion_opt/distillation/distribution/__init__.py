"""Students that match the teacher's distribution, whichever path leads there."""

from diffusion_opt.distillation.distribution.adversarial import (
    AdversarialDistillation,
    FeatureHeads,
    GanSettings,
    approximate_r1,
    captured,
    discriminator_loss,
    feature_layers,
    generator_loss,
)
from diffusion_opt.distillation.distribution.alarms import Alarms
from diffusion_opt.distillation.distribution.dmd import DistributionMatching, dmd_gradient, dmd_loss, fake_score_loss
from diffusion_opt.distillation.distribution.f_divergence import DIVERGENCES, RatioBins, divergence_weight
from diffusion_opt.distillation.distribution.rcm import RegularizedMatching
from diffusion_opt.distillation.distribution.score_identity import ScoreIdentity, score_identity_loss
from diffusion_opt.distillation.distribution.settings import (
    AdversarialSettings,
    HeadSettings,
    IdentitySettings,
    MatchSettings,
)

__all__ = [
    "DIVERGENCES",
    "AdversarialDistillation",
    "AdversarialSettings",
    "Alarms",
    "DistributionMatching",
    "FeatureHeads",
    "GanSettings",
    "HeadSettings",
    "IdentitySettings",
    "MatchSettings",
    "RatioBins",
    "RegularizedMatching",
    "ScoreIdentity",
    "approximate_r1",
    "captured",
    "discriminator_loss",
    "divergence_weight",
    "dmd_gradient",
    "dmd_loss",
    "fake_score_loss",
    "feature_layers",
    "generator_loss",
    "score_identity_loss",
]
