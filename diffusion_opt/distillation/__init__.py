"""Teachers and students: what the training loop fits, and how the shipped models were made."""

from diffusion_opt.distillation.flow_matching import FlowMatching

__all__ = ["FlowMatching"]
