"""Dynamic INT8 linears: the quantization that is really faster on a CPU.

    y = s_x s_w (q_x - z_x) q_w^T + b       8-bit integers multiplied, 32-bit sums, one rescaling at the end

Weights are quantized once, symmetric, one scale an output channel: s_w = max|w| / 127. Activations are quantized in
each call to the range of that call, one scale s_x = (max x - min x) / (2^p - 1) for the whole tensor ("dynamic":
nothing to calibrate). Both roundings are at most half a step, so for output n, with k running over inputs,

    |error of y_n|  <=  s_w / 2 sum_k |x_k|  +  s_x / 2 sum_k |s_w q_w|

The processor decides which of torch's two kernels does it (`kernel_here`):

    vnni       oneDNN's integer product (`torch.ops.onednn.qlinear_pointwise`) where the CPU adds four products in 32
               bits at once (AVX-VNNI, AVX-512 VNNI, AMX). p = 8
    portable   `torch.ops.quantized.linear_dynamic` everywhere else (fbgemm on x86, QNNPACK on ARM). p = 7: x86 without
               VNNI adds pairs of products in 16 bits, and 8-bit activations would overflow there

From which width they pay, and what the others cost (weight-only, bfloat16, float16, `torch._int_mm`, a calibrated
scale), `benchmarks/cpu_precision.py` measures. Since the range is that of the whole tensor, an outlier in one sample
of a batch costs the precision of all.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int8
from torch import Tensor, nn

from diffusion_opt.quantization.faster.replacement import EightBitLinear, exchange, layers_to_replace, put_back
from diffusion_opt.quantization.policy import as_tuple

Kernel = Literal["vnni", "portable"]
VNNI = ("avx_vnni", "avx512_vnni", "amx_int8")  # torch's names of the instructions
MIN_WIDTH: dict[Kernel, int] = {"vnni": 128, "portable": 192}  # narrower layers are slower in INT8 than in float32
NAME = "dynamic INT8"
SMALLEST_SCALE = 1e-37  # of activations: its inverse is still a float32


def kernel_here() -> tuple[Kernel, str]:
    """The kernel that is the faster one on this CPU, and why."""
    has = torch.cpu.get_capabilities()
    found = [name for name in VNNI if has.get(name)]
    if not found:
        return "portable", f"this CPU ({has.get('architecture', 'unknown')}) has none of {', '.join(VNNI)}"
    if not torch.backends.mkldnn.is_available():
        return "portable", "this build of torch has no oneDNN"
    return "vnni", f"this CPU has {', '.join(found)}"


def weight_scales(weight: Float[Tensor, "o i"]) -> Float[Tensor, " o"]:
    """Symmetric INT8 scale of each output channel, max|w| / 127; 1 where a channel is all zero."""
    largest = weight.detach().abs().amax(dim=1)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


class DynamicInt8Linear(EightBitLinear):
    """An `nn.Linear` with 8-bit weights, packed for one of the CPU's integer kernels (None: the one for this CPU).

    Raises ValueError for weights that are not finite float32 on a CPU, and in use for such inputs.
    """

    def __init__(self, linear: nn.Linear, kernel: Kernel | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        _check_float_cpu(weight, "weights")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weights must be finite, {int((~weight.isfinite()).sum())} of them are not")
        scales = weight_scales(weight)
        integers = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._fill(integers, scales, linear.bias.detach().clone() if linear.bias is not None else None, kernel)

    @classmethod
    def from_integers(
        cls,
        integers: Int8[Tensor, "o i"],
        scales: Float[Tensor, " o"],
        bias: Float[Tensor, " o"] | None,
        kernel: Kernel | None = None,
    ) -> "DynamicInt8Linear":
        """The layer that computes with these weights, integers * scales."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(integers, scales, bias, kernel)
        return layer

    def _fill(self, integers: Tensor, scales: Tensor, bias: Tensor | None, kernel: Kernel | None) -> None:
        self.out_features, self.in_features = integers.shape
        self.kernel = kernel_here()[0] if kernel is None else kernel
        self.scales, self.bias = scales, bias
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self._packed = self._pack(integers)

    @property
    def kind(self) -> str:
        return "dynamic_int8"

    def stored(self) -> dict[str, Tensor | None]:
        return {"integers": self.integers(), "scales": self.scales, "bias": self.bias}

    @property
    def bits(self) -> int:
        """Of the activations."""
        return 8 if self.kernel == "vnni" else 7

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        _check_float_cpu(x, "inputs")
        if self.kernel == "portable":
            return torch.ops.quantized.linear_dynamic(x, self._packed, True)  # True: 7-bit activations
        return self.product(x, *activation_grid(x, self.bits))

    @torch.compiler.disable
    def product(self, x: Float[Tensor, "*b i"], scale: float, zero: int) -> Float[Tensor, "*b o"]:
        """The layer on a given grid of 8-bit activations, scale (q - zero); for the vnni kernel."""
        codes = torch.quantize_per_tensor(x.contiguous(), scale, zero, torch.quint8)
        # oneDNN wants plain bytes: the same memory without torch's quantized type around it.
        codes = torch.empty(0, dtype=torch.uint8).set_(codes.untyped_storage(), 0, codes.shape, codes.stride())
        weight = (self._packed, self.scales, self._zeros, self.bias)
        as_float = (1.0, 0, torch.float32, "none", [], "")
        out = torch.ops.onednn.qlinear_pointwise(codes, scale, zero, *weight, *as_float)
        return out.view(*x.shape[:-1], self.out_features)  # it flattens what is empty

    def _pack(self, integers: Int8[Tensor, "o i"]) -> Any:
        """The weights in the order that the kernel reads them in."""
        with warnings.catch_warnings():
            # torch's quantized types are on their way out, and these kernels have no successor yet. It warns once a
            # process, at the first tensor of such a type, which is therefore made here.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            typed = torch._make_per_channel_quantized_tensor(integers, self.scales.double(), self._zeros, 0)
        if self.kernel == "vnni":
            return torch.ops.onednn.qlinear_prepack(integers, None)
        return torch.ops.quantized.linear_prepack(typed, self.bias)

    @property
    def weight_bytes(self) -> int:
        """One byte per weight, a float32 scale and an int32 zero point per channel, and the bias in float32."""
        return self.out_features * (self.in_features + 8 + 4 * self.has_bias)

    def integers(self) -> Int8[Tensor, "o i"]:
        """The 8-bit weights, unpacked."""
        if self.kernel == "vnni":
            return self._packed.to_dense().t().contiguous()
        return self._packed.unpack()[0].int_repr()

    def dequantized_weight(self) -> Float[Tensor, "o i"]:
        """The weights that the integers stand for."""
        return self.integers() * self.scales[:, None]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": self.integers()}  # torch copies neither of the packed forms faithfully

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = self._pack(state["_packed"])


@torch.compiler.disable
def activation_grid(x: Float[Tensor, "*b i"], bits: int) -> tuple[float, int]:
    """Scale and zero point of unsigned integers over the range of x and 0. Raises ValueError for inf and NaN."""
    if not x.numel():
        return 1.0, 0
    low, high = (float(end) for end in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    if not math.isfinite(high - low):
        raise ValueError(f"inputs must be finite, their range is {low:g} … {high:g}")
    scale = max((high - low) / (2**bits - 1), SMALLEST_SCALE)
    return scale, round(-low / scale)


def _check_float_cpu(tensor: Tensor, what: str) -> None:
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"dynamic INT8 runs on float32 {what} on a CPU, got {tensor.dtype} on {tensor.device}")


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Technique: the block linears of all denoisers become `DynamicInt8Linear`s. CPU and float32 only; really faster.

    Which layers, the policy of the family says. With `reversible` the float layers are kept aside, out of the model and
    of its measured bytes but still in memory, and `remove` puts those very modules back; without it their memory is
    freed and `remove` raises.
    """

    min_width: int | None = None  # layers with fewer inputs or outputs are left alone; None: `MIN_WIDTH` of the kernel
    skip: Sequence[str] = ()  # regular expressions; layers whose whole name matches are left alone
    reversible: bool = True

    def __post_init__(self) -> None:
        if self.min_width is not None and self.min_width < 0:
            raise ValueError(f"min_width must be 0 (quantize all) or more, got {self.min_width}")
        object.__setattr__(self, "skip", as_tuple("skip", self.skip))

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Quantize in place and return the pipeline, unchanged if this raises.

        Raises ValueError if the model is not float32 on a CPU, is quantized already, is held by offloading, or no layer
        is left to quantize.
        """
        kernel, _ = kernel_here()
        min_width = MIN_WIDTH[kernel] if self.min_width is None else self.min_width
        hint = f"; min_width=0 makes weights smaller, though hardly faster below {MIN_WIDTH[kernel]}"
        layers = partial(layers_to_replace, min_width=min_width, skip=self.skip, hint=hint)
        exchange(pipe, NAME, layers, partial(DynamicInt8Linear, kernel=kernel), self.reversible)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the float layers back. Raises ValueError if there are none to put back."""
        put_back(pipe, NAME)

    def describe(self) -> str:
        return "INT8 linears (real CPU kernel)"
