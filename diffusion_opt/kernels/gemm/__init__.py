"""Products of 8-bit matrices with an epilogue: linear layers in W8A8."""

from diffusion_opt.kernels.gemm.operator import STEP, QuantizedRows, quantize_rows, quantized_linear

__all__ = ["STEP", "QuantizedRows", "quantize_rows", "quantized_linear"]
