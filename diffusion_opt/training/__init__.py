"""The training loop: one for teachers, students and quantized networks; a method brings its losses and its roles."""

from diffusion_opt.training.config import TrainConfig, step_generator
from diffusion_opt.training.distributed import Processes, is_sharded, process_group, processes, shard
from diffusion_opt.training.trainer import Distiller, Role, TrainResult, train

__all__ = [
    "Distiller",
    "Processes",
    "Role",
    "TrainConfig",
    "TrainResult",
    "is_sharded",
    "process_group",
    "processes",
    "shard",
    "step_generator",
    "train",
]
