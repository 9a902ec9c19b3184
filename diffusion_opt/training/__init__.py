"""The training loop: one for teachers, students and quantized networks; a method brings its losses and its roles."""

from diffusion_opt.training.trainer import Distiller, Role, TrainConfig, TrainResult, step_generator, train

__all__ = ["Distiller", "Role", "TrainConfig", "TrainResult", "step_generator", "train"]
