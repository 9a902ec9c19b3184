"""What is quantized and what is not, by name and by bytes: no silent no-ops."""

from dataclasses import dataclass
from typing import Literal

from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.quantization.faster.replacement import EightBitLinear
from diffusion_opt.quantization.packed.packing import PackedLinear
from diffusion_opt.subjects import denoisers

Kind = Literal["float", "simulated", "packed", "8-bit"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer: how it computes, and the bytes its weights occupy now and in 32-bit floats."""

    name: str
    kind: Kind
    weight_bytes: int
    float32_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """All linear layers of a pipeline's denoisers, in order; what `simulated` layers occupy is still full precision."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if layer.kind != "float")

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if layer.kind == "float")

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def float32_bytes(self) -> int:
        return sum(layer.float32_bytes for layer in self.layers)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"{layer.name:<{width}}  {layer.kind:<9}  {layer.weight_bytes:>12,} bytes" for layer in self.layers]
        total = (
            f"{len(self.quantized)} of {len(self.layers)} linear layers quantized, "
            f"{self.weight_bytes:,} bytes instead of {self.float32_bytes:,}"
        )
        return "\n".join([*lines, total])


def quantization_report(pipe: DiffusionPipeline) -> QuantizationReport:
    """Every linear layer of the pipeline's denoisers; of two of them, under the name of its network."""
    networks = denoisers(pipe)
    prefix = {name: f"{name}." if len(networks) > 1 else "" for name in networks}
    layers = (
        _describe(prefix[key] + name, module)
        for key, network in networks.items()
        for name, module in network.named_modules()
    )
    return QuantizationReport(tuple(layer for layer in layers if layer is not None))


def _describe(name: str, module: nn.Module) -> LayerReport | None:
    if isinstance(module, EightBitLinear | PackedLinear):
        floats = 4 * module.out_features * (module.in_features + (module.bias is not None))
        kind = "packed" if isinstance(module, PackedLinear) else "8-bit"
        return LayerReport(name, kind, weight_bytes(module), floats)
    if not isinstance(module, nn.Linear):
        return None
    tensors = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    quantizer = getattr(module, "weight_quantizer", None)
    simulated = quantizer is not None and quantizer.is_enabled
    return LayerReport(
        name,
        "simulated" if simulated else "float",
        sum(tensor.nbytes for tensor in tensors),
        4 * sum(tensor.numel() for tensor in tensors),
    )
