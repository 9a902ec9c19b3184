"""Students that follow the teacher's path."""

from diffusion_opt.distillation.trajectory.flow_map_distillation import METHODS, FlowMapDistillation, FlowMapSettings
from diffusion_opt.distillation.trajectory.guidance import GuidanceDistillation, guided_velocity
from diffusion_opt.distillation.trajectory.metrics import adaptive_loss, pseudo_huber
from diffusion_opt.distillation.trajectory.ode_distillation import OdeDistillation
from diffusion_opt.distillation.trajectory.pairs import OdePairs, PairConfig, generate_pairs, load_pairs, sample_noise
from diffusion_opt.distillation.trajectory.progressive import ProgressiveDistillation, train_progressively
from diffusion_opt.distillation.trajectory.refinement import TAU, Refinement, RefinementSettings
from diffusion_opt.distillation.trajectory.reflow import Reflow
from diffusion_opt.distillation.trajectory.truncated import TruncatedConsistency, TruncatedSettings

__all__ = [
    "METHODS",
    "TAU",
    "FlowMapDistillation",
    "FlowMapSettings",
    "GuidanceDistillation",
    "OdeDistillation",
    "OdePairs",
    "PairConfig",
    "ProgressiveDistillation",
    "Refinement",
    "RefinementSettings",
    "Reflow",
    "TruncatedConsistency",
    "TruncatedSettings",
    "adaptive_loss",
    "generate_pairs",
    "guided_velocity",
    "load_pairs",
    "pseudo_huber",
    "sample_noise",
    "train_progressively",
]
