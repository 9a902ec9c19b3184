"""Students that follow the teacher's path."""

from diffusion_opt.distillation.trajectory.ode_distillation import OdeDistillation, pseudo_huber
from diffusion_opt.distillation.trajectory.pairs import OdePairs, PairConfig, generate_pairs, load_pairs, sample_noise

__all__ = [
    "OdeDistillation",
    "OdePairs",
    "PairConfig",
    "generate_pairs",
    "load_pairs",
    "pseudo_huber",
    "sample_noise",
]
