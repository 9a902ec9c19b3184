"""Fewer bits: one layer policy, a real INT8 path on the CPU, and any format simulated through nvidia-modelopt."""

from diffusion_opt.quantization.int8_cpu import DynamicInt8, DynamicInt8Linear
from diffusion_opt.quantization.modelopt_ptq import ModeloptPTQ
from diffusion_opt.quantization.policy import POLICIES, LayerChoice, LayerPolicy, choose, policy_for
from diffusion_opt.quantization.report import QuantizationReport, quantization_report

__all__ = [
    "POLICIES",
    "DynamicInt8",
    "DynamicInt8Linear",
    "LayerChoice",
    "LayerPolicy",
    "ModeloptPTQ",
    "QuantizationReport",
    "choose",
    "policy_for",
    "quantization_report",
]
