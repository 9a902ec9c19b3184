"""What we speed up: pipelines, the shipped checkpoints, one adapter for each transformer family."""

from diffusion_opt.models.block_stack import BlockStack, Streams, block_stack
from diffusion_opt.models.build import SIZES, TinyFlux2Config, build_pipeline
from diffusion_opt.models.flow_map import flow_map_transformer
from diffusion_opt.models.flux2 import Flux2Velocity, TokenCondition, position_ids, velocity_model
from diffusion_opt.models.ladder import set_ladders
from diffusion_opt.models.ltx2 import LTX2Velocity
from diffusion_opt.models.pipeline import ClassEmbedder, PixelShuffleVAE, TinyFlux2Pipeline
from diffusion_opt.models.points import PointVelocity
from diffusion_opt.models.prompt_table import PromptTable
from diffusion_opt.models.schedulers import FlowMatchAdamsBashforthScheduler, flow_scheduler
from diffusion_opt.models.wan import WanVelocity
from diffusion_opt.models.zoo import load, ship
from diffusion_opt.names import SHIPPED, ShippedModel

__all__ = [
    "SHIPPED",
    "SIZES",
    "BlockStack",
    "ClassEmbedder",
    "FlowMatchAdamsBashforthScheduler",
    "Flux2Velocity",
    "LTX2Velocity",
    "PixelShuffleVAE",
    "PointVelocity",
    "PromptTable",
    "ShippedModel",
    "Streams",
    "TinyFlux2Config",
    "TinyFlux2Pipeline",
    "TokenCondition",
    "WanVelocity",
    "block_stack",
    "build_pipeline",
    "flow_map_transformer",
    "flow_scheduler",
    "load",
    "position_ids",
    "set_ladders",
    "ship",
    "velocity_model",
]
