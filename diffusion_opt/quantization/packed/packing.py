"""Packed linears: the weights in 4 or 8 bits in memory, and the output of the simulation they were packed from.

    PTQ("nvfp4").apply(pipe)     rounds, and keeps every float32 weight: what a format does to images
    pack(pipe)                   keeps the codes and scales alone: what it does to memory and disk

A packed layer decodes its weight in each call, rounds its input as it was calibrated, and multiplies in float:

    y = Q(x s) W^T + b  (+ x s A^T B^T)        W decoded from codes; s, A, B: smoothing and branch, where there are any

so its output is that of the simulation bit for bit, and it is no faster: the time of a real kernel is another matter
(`int8_cpu.py`; on a GPU `w8a8.py`, or a checkpoint from `export.py` in a program with kernels for 4 bits).
`encoding.py` says which bytes hold which numbers. modelopt has `mtq.compress` for the same purpose; what it compressed
diffusers cannot save, and reading it takes modelopt. Here torch is enough.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.models.fingerprint import same_model
from diffusion_opt.quantization.arithmetic.fp8 import fp8
from diffusion_opt.quantization.arithmetic.int8 import int8
from diffusion_opt.quantization.exact import apply_keeping
from diffusion_opt.quantization.formats import Format, Numbers
from diffusion_opt.quantization.guards import (
    NO_STATE_DICT,
    PACKED,
    close_doors,
    close_saving,
    refuse_adapters,
    refuse_offloading,
)
from diffusion_opt.quantization.packed.encoding import Encoded, Shape, decode, encode, layout
from diffusion_opt.quantization.simulation.cpu_backend import round_blocks
from diffusion_opt.quantization.simulation.simulate import restore, simulated_formats
from diffusion_opt.subjects import denoisers

EXACT = ("codes", "scales", "range", "input_amax", "down", "up")  # never cast: another type would be another number
OTHERS = ("smoothing", "bias")  # in the type that is computed in


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """All there is to know about a packed layer but its numbers."""

    name: str  # of the format, for people
    in_features: int
    out_features: int
    weight: Numbers
    input: Numbers | None  # None: inputs are not rounded
    bias: bool = True
    smoothed: bool = False  # whether each input channel is multiplied with a factor first
    rank: int = 0  # of the branch beside the codes

    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of each tensor that such a layer holds; the types of `OTHERS` are those of float32 models."""
        held = dict(layout(self.weight, self.out_features, self.in_features))
        if self.input is not None and self.input.calibrated:
            held["input_amax"] = ((), torch.float32)
        if self.smoothed:
            held["smoothing"] = ((self.in_features,), torch.float32)
        if self.rank:
            held["down"] = ((self.rank, self.in_features), torch.bfloat16)
            held["up"] = ((self.out_features, self.rank), torch.bfloat16)
        if self.bias:
            held["bias"] = ((self.out_features,), torch.float32)
        return held


class PackedLinear(nn.Module):
    """A linear layer that holds codes and scales in place of its weight. For inference: it has no gradient.

    Raises ValueError naming the first tensor that is missing, not part of the format, or of another shape or type.
    """

    def __init__(self, format: PackedFormat, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        check_tensors(format.name, format.tensors(), tensors)
        self.format, self.in_features, self.out_features = format, format.in_features, format.out_features
        for name in (*EXACT, *OTHERS):
            self.register_buffer(name, tensors.get(name))

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if self.smoothing is not None:
            x = x * self.smoothing
        inputs = x if self.format.input is None else rounded(x, self.format.input, self.input_amax)
        y = F.linear(inputs, self.dequantized_weight().to(x.dtype), self.bias)
        return y if self.down is None else y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def dequantized_weight(self) -> Float[Tensor, "o i"]:
        """The float32 weights that the codes stand for, without the branch."""
        return decode(Encoded(self.codes, self.scales, self.range), self.format.weight, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Move to a device; a cast (`.half()`) reaches only what is computed with."""
        apply_keeping(self, EXACT, fn, recurse)
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        raise RuntimeError(NO_STATE_DICT.format(what="packed layers"))


def rounded(x: Float[Tensor, "*b i"], numbers: Numbers, amax: Float[Tensor, ""] | None) -> Float[Tensor, "*b i"]:
    """An input as its quantizer hands it on, in x's type; `amax` is its calibrated range, where it has one."""
    if numbers.per == "block":
        return round_blocks(x, numbers.num_bits, numbers.block, numbers.scale_bits, amax)
    floats = x.float()
    amax = floats.abs().amax(-1, keepdim=True) if numbers.per == "token" else amax
    held = int8(floats, amax, numbers.bits) if isinstance(numbers.num_bits, int) else fp8(floats, amax)
    return held.to(x.dtype)


@torch.no_grad()
def pack(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Replace each simulated linear of all denoisers by a `PackedLinear`; its float weight is gone.

    For a pipeline on which `PTQ` or training through it has acted. The output stays the same bit for bit, and there is
    no way back. Raises ValueError, with the pipeline unchanged, if a denoiser has no simulated layer, a LoRA is on it,
    or offloading holds its layers.
    """
    networks = denoisers(pipe)
    packed = {name: _packed_layers(network) for name, network in networks.items()}
    for name, network in networks.items():
        with same_model(network, "packed"):
            restore(network)
            for layer_name, layer in packed[name].items():
                network.set_submodule(layer_name, layer)
        close_doors(network, PACKED)
    close_saving(pipe, PACKED["save_pretrained"])
    return pipe


def _packed_layers(network: nn.Module) -> dict[str, PackedLinear]:
    """The packed form of each simulated layer by name. Raises ValueError as `pack` does."""
    formats = simulated_formats(network)
    if not formats:
        raise ValueError("nothing to pack: no layer is quantized in simulation; apply PTQ(format) first")
    refuse_adapters(network, "pack")
    refuse_offloading(network, "pack the pipeline first and turn it on afterwards")
    return {name: _packed(network.get_submodule(name), format) for name, format in formats.items()}


def _packed(layer: nn.Linear, format: Format) -> PackedLinear:
    """The packed form of one of modelopt's linear layers."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    encoded = encode(layer.weight, format.weight, weights.amax)
    tensors = {
        **encoded._asdict(),
        "input_amax": None if format.input is None or not format.input.calibrated else inputs.amax,
        "smoothing": inputs.pre_quant_scale,
        "down": weights.svdquant_lora_a.bfloat16() if format.rank else None,
        "up": weights.svdquant_lora_b.bfloat16() if format.rank else None,
        "bias": layer.bias,
    }
    shape = (layer.in_features, layer.out_features)
    extras = (layer.bias is not None, tensors["smoothing"] is not None, format.rank)
    about = PackedFormat(format.name, *shape, format.weight, format.input, *extras)
    shapes = {name: shape for name, (shape, _) in about.tensors().items()}
    held = {name: t.detach().reshape(shapes[name]) for name, t in tensors.items() if t is not None}
    packed = PackedLinear(about, {name: t.clone(memory_format=torch.contiguous_format) for name, t in held.items()})
    simulated = weights(layer.weight)
    assert torch.equal(packed.dequantized_weight().to(simulated.dtype), simulated), f"{about} is encoded wrongly"
    return packed


def check_tensors(format: str, wanted: Mapping[str, tuple[Shape, torch.dtype]], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor that a layer of this format lacks, does not know, or has otherwise."""
    for name in sorted({*wanted, *found}):
        if name not in found or name not in wanted:
            raise ValueError(f"{name} is {'missing' if name in wanted else 'no part'} of a layer in {format}")
        tensor, (shape, dtype) = found[name], wanted[name]
        if tuple(tensor.shape) != shape or (name not in OTHERS and tensor.dtype != dtype):
            raise ValueError(
                f"{name} of a layer in {format} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
