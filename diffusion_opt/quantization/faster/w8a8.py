"""W8A8 linears: weights and activations in 8 bits on the matrix units of a GPU, int8 or e4m3.

    y = s_x s_w (q_x q_w^T) + b       one scale s_x for each token, one s_w for each output channel

Nothing is calibrated: the scale of a token is its own largest magnitude over 127 (int8) or 448 (e4m3), found in the
pass that rounds it. Matrix units multiply both types at twice the rate of bfloat16, and the kernel (`kernels/gemm`)
takes the scales out of the sum, so that rescaling and bias cost no pass over memory. int8 runs from sm_80 on (A100),
e4m3 from sm_89 on (L4, H100).

Of the two, int8 is the more exact where the numbers of a token are of one size (rounding error at most 1/254 of the
largest), e4m3 where a few are much larger than the rest (1/16 of each number itself).

On a CPU the same layers compute by the kernel's reference: the same numbers, so that quality can be judged without a
GPU, and no faster; `DynamicInt8` is the technique for speed there. The rate is that of the matrix units and holds for
layers that are limited by them; what a model gains must be timed on the GPU at hand: the ladder does it
(`diffusion-opt demo --device cuda`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from diffusion_opt.kernels.gemm import STEP, QuantizedRows, quantize_rows, quantized_linear
from diffusion_opt.quantization.exact import apply_keeping
from diffusion_opt.quantization.faster.replacement import EightBitLinear, exchange, layers_to_replace, put_back
from diffusion_opt.quantization.policy import as_tuple
from diffusion_opt.subjects import denoisers

NAME = "W8A8"
NumberType = Literal["int8", "e4m3"]
KINDS = {"dynamic_int8": "integers", "dynamic_e4m3": "codes"}  # the name of the codes in a saved pipeline
TYPES: dict[NumberType, torch.dtype] = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
OLDEST: dict[NumberType, tuple[int, int]] = {"int8": (8, 0), "e4m3": (8, 9)}  # compute capability with such units


def obstacle(numbers: NumberType, device: torch.device) -> str | None:
    """Why W8A8 is not fast on this device; None if it is."""
    if device.type != "cuda":
        return f"W8A8 is a kernel for CUDA GPUs, on {device.type} it computes the same numbers without being faster"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST[numbers]:
        have, need = (".".join(map(str, version)) for version in (capability, OLDEST[numbers]))
        return f"{numbers} matrix units come with compute capability {need}, this GPU has {have}"
    return None


class W8A8Linear(EightBitLinear):
    """An `nn.Linear` whose weights are 8-bit codes with a scale for each output channel, (o, i) and (o,).

    Takes and gives any floating type. Raises ValueError for weights that are not finite.
    """

    def __init__(self, linear: nn.Linear, numbers: NumberType) -> None:
        weight = linear.weight.detach()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weights must be finite, {int((~weight.isfinite()).sum())} of them are not")
        rows = quantize_rows(weight, TYPES[numbers])
        self._fill(rows.values, rows.scales, None if linear.bias is None else linear.bias.detach().clone())

    @classmethod
    def from_codes(
        cls, codes: Shaped[Tensor, "o i"], scales: Float[Tensor, " o"], bias: Float[Tensor, " o"] | None
    ) -> "W8A8Linear":
        """The layer that computes with these weights, codes * scales."""
        layer = cls.__new__(cls)
        layer._fill(codes, scales, bias)
        return layer

    def _fill(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        for name, tensor in (("codes", codes), ("scales", scales), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        rows = quantize_rows(x.reshape(1, -1, self.in_features), self.codes.dtype)
        out = quantized_linear(rows, QuantizedRows(self.codes, self.scales), self.bias, x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def kind(self) -> str:
        return f"dynamic_{self.numbers}"

    def stored(self) -> dict[str, Tensor | None]:
        return {KINDS[self.kind]: self.codes, "scales": self.scales, "bias": self.bias}

    @property
    def numbers(self) -> NumberType:
        return next(name for name, dtype in TYPES.items() if dtype == self.codes.dtype)

    @property
    def weight_bytes(self) -> int:
        """One byte per weight, a float32 scale per channel, and the bias."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def dequantized_weight(self) -> Float[Tensor, "o i"]:
        """The weights that the codes stand for."""
        return self.codes.float() * self.scales[:, None]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, numbers={self.numbers}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "W8A8Linear":
        """Moves with the model. Codes and scales are never cast: in another type they would be other numbers."""
        apply_keeping(self, ("codes", "scales"), fn, recurse)
        return self


@dataclass(frozen=True, slots=True)
class W8A8:
    """Technique: the block linears of all transformers become `W8A8Linear`s.

    Which layers, the policy of the family says; those whose features are no multiples of 16 stay as they are. With
    `require_fast` it refuses where this would not be faster. With `reversible` the float layers are kept aside, out of
    the model and of its measured bytes but still in memory, and `remove` puts those very modules back.
    """

    numbers: str = "int8"  # or "e4m3"
    min_width: int = 0  # layers with fewer inputs or outputs are left alone
    skip: Sequence[str] = ()  # regular expressions; layers whose whole name matches are left alone
    require_fast: bool = True
    reversible: bool = True

    def __post_init__(self) -> None:
        if self.numbers not in TYPES:
            raise ValueError(f"numbers must be one of {', '.join(TYPES)}, got {self.numbers!r}")
        if self.min_width < 0:
            raise ValueError(f"min_width must be 0 (quantize all) or more, got {self.min_width}")
        object.__setattr__(self, "skip", as_tuple("skip", self.skip))

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Quantize in place and return the pipeline, unchanged if this raises.

        Raises ValueError if the model is quantized already, is held by offloading, no layer is left to quantize, or
        this machine has no units for it.
        """
        reason = obstacle(self.numbers, next(next(iter(denoisers(pipe).values())).parameters()).device)
        if self.require_fast and reason is not None:
            raise ValueError(f"{reason}; W8A8(require_fast=False) applies it for its accuracy alone")
        layers = partial(layers_to_replace, min_width=self.min_width, skip=self.skip, multiple_of=STEP)
        exchange(pipe, NAME, layers, partial(W8A8Linear, numbers=self.numbers), self.reversible)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the float layers back. Raises ValueError if there are none to put back."""
        put_back(pipe, NAME)

    def describe(self) -> str:
        return f"W8A8 linears ({self.numbers}, GPU kernel)"
