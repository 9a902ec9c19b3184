"""Block formats for modelopt in plain PyTorch: NVFP4, MX and INT4 blocks on any device, with a gradient.

modelopt rounds blocks by CUDA code alone: its NVFP4 and MX recipes raise on a CPU. But it lets others register how a
quantizer rounds (`register_quant_backend`), and then its calibration, SmoothQuant, SVDQuant and training run as they
are. `register` does so under the name "diffusion_opt", which `formats.py` writes into the configuration.

The values are those that modelopt's packed tensors (`NVFP4QTensor`, `MXFP8QTensor`) unpack to, bit for bit, so what is
trained and measured in simulation is what a checkpoint stores. The gradient is that of the identity (a straight-through
estimator, Bengio et al. 2013, arXiv 1308.3432), and so is modelopt's by default.

NVFP4's tensor scale is the range that was calibrated; block scales are found in each call. A block that outgrows the
calibrated range saturates, as it would in hardware.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_opt.kernels.quantizers.formats import NVFP4_BLOCK, NVFP4_MAX, block_scales_and_codes, nonzero
from diffusion_opt.quantization.arithmetic.int4 import int4_blocks
from diffusion_opt.quantization.arithmetic.mx import mxfp8_blocks
from diffusion_opt.quantization.formats import BACKEND


def register() -> None:
    """Make the block formats known to modelopt, once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.nn.modules import tensor_quantizer as modelopt
    if not modelopt.is_registered_quant_backend(BACKEND):
        modelopt.register_quant_backend(BACKEND, _entry)


def round_blocks(
    x: Float[Tensor, "*s n"],
    num_bits: int | tuple[int, int],
    block: int,
    scale_bits: tuple[int, int] | None,
    amax: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "*s n"]:
    """x in a block format, blocks along the last axis, in x's type; the gradient is that of the identity.

    `amax` is the calibrated range of NVFP4 (None: that of x). Raises ValueError for a format that is not here.
    """
    kind = (num_bits, block, scale_bits)
    if kind == ((2, 1), NVFP4_BLOCK, (4, 3)):
        largest = x.detach().abs().amax() if amax is None else amax.amax()
        return _Straight.apply(x, lambda blocks: _nvfp4_blocks(blocks, largest.float()), block)
    if kind[0] == (4, 3) and scale_bits == (8, 0):
        return _Straight.apply(x, mxfp8_blocks, block)
    if kind[0] == 4 and scale_bits is None:
        return _Straight.apply(x, int4_blocks, block)
    raise ValueError(
        f"no block format of num_bits={num_bits}, blocks of {block} and scale_bits={scale_bits}: there are NVFP4 "
        "((2, 1), 16, (4, 3)), MXFP8 ((4, 3), any, (8, 0)) and INT4 (4, any, None)"
    )


def _nvfp4_blocks(blocks: Float[Tensor, "*b k"], largest: Float[Tensor, ""]) -> Float[Tensor, "*b k"]:
    unit = nonzero(largest / NVFP4_MAX)
    scales, codes = block_scales_and_codes(blocks, unit.reshape(1))
    return codes * (scales * unit)


class _Straight(torch.autograd.Function):
    """A rounding of blocks with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor], block: int) -> Tensor:
        length = x.shape[-1]
        blocks = F.pad(x.float(), (0, -length % block)).unflatten(-1, (-1, block))
        return rounding(blocks).flatten(-2)[..., :length].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _entry(x: Tensor, quantizer: nn.Module) -> Tensor:
    """What modelopt calls: a tensor and the quantizer that says how to round it."""
    sizes = quantizer.block_sizes
    block = sizes.get(-1) or sizes.get(x.ndim - 1)
    scale_bits = sizes.get("scale_bits")
    amax = quantizer._get_amax(x) if scale_bits == (4, 3) else None
    return round_blocks(x, quantizer.num_bits, block, scale_bits, amax)
