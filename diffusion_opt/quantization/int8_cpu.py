"""Dynamic INT8 linears: the one quantization that is really faster on a CPU.

    y = s_x s_w (q_x - z_x) q_w^T + b       8-bit integers multiplied, 32-bit sums, one rescaling at the end

Weights are quantized once, symmetric, one scale an output channel: s_w = max|w| / 127. Activations are quantized in
each call to the range of that call, one scale s_x = (max x - min x) / 127 for the whole tensor ("dynamic": nothing to
calibrate; the kernel takes no s_x below 6.1e-5). That is 7 bits, not 8: without VNNI instructions an x86 CPU adds pairs
of products in 16 bits, and 8-bit activations would overflow there. Both roundings are at most half a step, so for
output n, with k running over inputs,

    |error of y_n|  <=  s_w / 2 sum_k |x_k|  +  s_x / 2 sum_k |s_w q_w|

The kernel is torch's own (`torch.ops.quantized.linear_dynamic`: fbgemm or oneDNN on x86, QNNPACK on ARM).
It pays from a width of about 200 and grows with it; other low-precision paths (bfloat16, torchao, weight-only) are
slower than float32 on CPUs without special instructions. Since the range is that of the whole tensor, an outlier in
one sample of a batch costs the precision of all.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.quantization.policy import as_tuple, choose

UNDO = "_diffusion_opt_float_layers"  # attribute of the transformer that holds what `remove` puts back


def weight_scales(weight: Float[Tensor, "o i"]) -> Float[Tensor, " o"]:
    """Symmetric INT8 scale of each output channel, max|w| / 127; 1 where a channel is all zero."""
    largest = weight.detach().abs().amax(dim=1)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


class DynamicInt8Linear(nn.Module):
    """An `nn.Linear` with 8-bit weights, packed for the CPU's integer kernel.

    Raises ValueError for weights that are not finite float32 on a CPU, and in use for such inputs.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        _check_float_cpu(weight, "weights")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weights must be finite, {int((~weight.isfinite()).sum())} of them are not")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.has_bias = linear.bias is not None
        scales = weight_scales(weight)
        integers = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        with warnings.catch_warnings():
            # The type that prepacking takes is on its way out of torch, and has no successor for this kernel yet.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            packable = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
        self._packed = torch.ops.quantized.linear_prepack(packable, bias)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        _check_float_cpu(x, "inputs")
        return torch.ops.quantized.linear_dynamic(x, self._packed, True)  # True: 7-bit activations

    @property
    def weight_bytes(self) -> int:
        """One byte a weight, a float32 scale and an int32 zero point a channel, and the bias in float32."""
        return self.out_features * (self.in_features + 8 + 4 * self.has_bias)

    def dequantized_weight(self) -> Float[Tensor, "o i"]:
        """The weights that the integers stand for."""
        return self._packed.unpack()[0].dequantize()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _save_to_state_dict(self, *_) -> None:
        raise RuntimeError(
            "packed INT8 weights have no state dict: save the recipe and quantize again after loading, or call the "
            "technique's remove(pipe) before saving"
        )


def _check_float_cpu(tensor: Tensor, what: str) -> None:
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"dynamic INT8 runs on float32 {what} on a CPU, got {tensor.dtype} on {tensor.device}")


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Technique: the block linears of a transformer become `DynamicInt8Linear`s. CPU and float32 only; really faster.

    Which layers, the policy of the family says. With `reversible` the float layers are kept aside, out of the model and
    of its measured bytes but still in memory, and `remove` puts those very modules back; without it their memory is
    freed and `remove` raises.
    """

    min_width: int = 192  # layers with fewer inputs or outputs are left alone: slower in INT8 than in float32
    skip: Sequence[str] = ()  # regular expressions; layers whose whole name matches are left alone
    reversible: bool = True

    def __post_init__(self) -> None:
        if self.min_width < 0:
            raise ValueError(f"min_width must be 0 (quantize all) or more, got {self.min_width}")
        object.__setattr__(self, "skip", as_tuple("skip", self.skip))

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Quantize in place and return the pipeline, unchanged if this raises.

        Raises ValueError if the family has no policy, the model is not float32 on a CPU, is quantized already, or no
        layer is left to quantize.
        """
        transformer = pipe.transformer
        choices = choose(transformer, self.min_width, self.skip)
        if any(isinstance(module, DynamicInt8Linear) for module in transformer.modules()):
            raise ValueError("this transformer has dynamic INT8 linears already: remove them first")
        chosen = [choice for choice in choices if choice.quantized]
        if not chosen:
            widest = max(min(c.layer.in_features, c.layer.out_features) for c in choices)
            raise ValueError(
                f"nothing to quantize with min_width={self.min_width} and skip={self.skip}: the widest layer has "
                f"{widest}; min_width=0 makes weights smaller, though hardly faster below 200"
            )
        other = next((choice for choice in chosen if type(choice.layer) is not nn.Linear), None)
        if other is not None:
            raise ValueError(f"{other.name} is a {type(other.layer).__name__}, not a plain nn.Linear: undo that first")
        quantized = {choice.name: DynamicInt8Linear(choice.layer) for choice in chosen}
        for name, layer in quantized.items():
            transformer.set_submodule(name, layer)
        floats = {choice.name: choice.layer for choice in chosen} if self.reversible else {}
        setattr(transformer, UNDO, floats)  # a plain dict, so its modules are no part of the model
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the float layers back. Raises ValueError if there are none to put back."""
        floats = getattr(pipe.transformer, UNDO, None)
        if not floats:
            why = "it was applied with reversible=False" if floats is not None else "it was not applied"
            raise ValueError(f"cannot remove dynamic INT8 from this pipeline: {why}")
        for name, layer in floats.items():
            pipe.transformer.set_submodule(name, layer)
        delattr(pipe.transformer, UNDO)

    def describe(self) -> str:
        return "INT8 linears (real CPU kernel)"
