"""Fewer bits: formats and a layer policy as data, simulation through nvidia-modelopt, and what is really faster."""

from diffusion_opt.quantization.attention.gradient import low_precision_attention
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention
from diffusion_opt.quantization.families import POLICIES, LayerPolicy
from diffusion_opt.quantization.faster.bfloat16 import Bfloat16
from diffusion_opt.quantization.faster.int8_cpu import DynamicInt8, DynamicInt8Linear
from diffusion_opt.quantization.faster.w8a8 import W8A8, W8A8Linear
from diffusion_opt.quantization.formats import FORMATS, Format, Numbers, format_named
from diffusion_opt.quantization.mixed.trajectory_points import TrajectoryPoints, trajectory_points, velocity_error
from diffusion_opt.quantization.packed.export import export_bfl, load_published
from diffusion_opt.quantization.packed.packing import PackedLinear, pack
from diffusion_opt.quantization.packed.storage import load_quantized, save_quantized
from diffusion_opt.quantization.policy import LayerChoice, choose, policy_for
from diffusion_opt.quantization.ptq import PTQ
from diffusion_opt.quantization.qat import QAT, SelfDistillation, quantization_aware
from diffusion_opt.quantization.report import QuantizationReport, quantization_report
from diffusion_opt.quantization.simulation.range_record import LayerRanges, RangeRecord, record_ranges
from diffusion_opt.quantization.simulation.simulate import restore, simulate, simulated_formats

__all__ = [
    "FORMATS",
    "POLICIES",
    "PTQ",
    "QAT",
    "W8A8",
    "Bfloat16",
    "DynamicInt8",
    "DynamicInt8Linear",
    "Format",
    "LayerChoice",
    "LayerPolicy",
    "LayerRanges",
    "LowPrecisionAttention",
    "Numbers",
    "PackedLinear",
    "QuantizationReport",
    "RangeRecord",
    "SelfDistillation",
    "TrajectoryPoints",
    "W8A8Linear",
    "choose",
    "export_bfl",
    "format_named",
    "load_published",
    "load_quantized",
    "low_precision_attention",
    "pack",
    "policy_for",
    "quantization_aware",
    "quantization_report",
    "record_ranges",
    "restore",
    "save_quantized",
    "simulate",
    "simulated_formats",
    "trajectory_points",
    "velocity_error",
]
