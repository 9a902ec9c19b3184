"""Students that match the teacher's distribution, whichever path leads there."""

from diffusion_opt.distillation.distribution.dmd import DistributionMatching, dmd_gradient, dmd_loss, fake_score_loss

__all__ = ["DistributionMatching", "dmd_gradient", "dmd_loss", "fake_score_loss"]
