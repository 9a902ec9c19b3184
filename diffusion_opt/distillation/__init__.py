"""Teachers and students: the training loop, what it fits, and how the shipped models were made."""

from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.distillation.trainer import Distiller, Role, TrainConfig, TrainResult, step_generator, train

__all__ = ["Distiller", "FlowMatching", "Role", "TrainConfig", "TrainResult", "step_generator", "train"]
