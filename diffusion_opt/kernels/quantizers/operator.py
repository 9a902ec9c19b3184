"""Quantizers of q, k and v as operators of torch: a kernel on a GPU, the same bits from PyTorch on a CPU.

    quantize_tokens(q, "int8", QUERY_GROUPS["block"])        codes (b, h, l, d) and scales for groups of tokens
    quantize_tokens(k, "int8", KEY_GROUPS["thread"], mean)   the same of k - mean
    quantize_channels(v)                                     e4m3 codes, a scale for each channel
    quantize_nvfp4(k, KEY_BLOCK, "channels", mean)           values e2m1 x e4m3, a float32 scale for each tile

`oracle.py` says what is computed and why. Inputs have any strides and are never changed. None of the four
has a gradient: the attention that uses them does (`fp4/operator.py`), or is for inference.

The smoothing mean is an argument and comes from torch, so that kernel and oracle round the same numbers. Any vector may
be given: softmax ignores it all the same, so the mean of the step before will do (`fused/qk_norm_rope` uses that).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.quantizers import oracle as reference
from diffusion_opt.kernels.quantizers.formats import E4M3_MAX, NVFP4_BLOCK, Nvfp4, nonzero
from diffusion_opt.kernels.quantizers.oracle import EightBit, Quantized, ScaleGroups

CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TOKEN_ALIGNMENT = 16  # where tokens are neighbors, each channel starts at a multiple of 16 bytes


def quantize_tokens(
    x: Float[Tensor, "b h l d"], to: EightBit, groups: ScaleGroups, mean: Float[Tensor, "b h d"] | None = None
) -> Quantized:
    """8-bit codes of x - mean with a scale for each group of tokens.

    Raises ValueError for another type of code, a mean of another shape, and, where a kernel would run, heads above 256.
    """
    if to not in CODE_TYPES:
        raise ValueError(f"codes are {' or '.join(CODE_TYPES)}, got {to!r}")
    if mean is not None:
        check_mean(mean, x, ())
    return Quantized(*tokens_op(x, mean, to, groups.window, groups.groups, groups.run))


def quantize_channels(x: Float[Tensor, "b h l d"]) -> Quantized:
    """e4m3 codes with a scale for each channel, over all tokens; tokens are neighbors in memory."""
    scales = nonzero(largest_of_channels(x) / E4M3_MAX)
    return Quantized(channels_op(x, scales), scales)


def quantize_nvfp4(
    x: Float[Tensor, "b h l d"],
    tile: int,
    along: Literal["channels", "tokens"],
    mean: Float[Tensor, "b h #tiles d"] | None = None,
) -> Nvfp4:
    """NVFP4 of x - mean in tiles of `tile` tokens, blocks of 16 along channels or tokens; values in x's type.

    `mean` has one row for all tokens or one for each tile. Raises ValueError for a mean of another shape, and for tiles
    that are no power of two from 16 on.
    """
    if along not in ("channels", "tokens") or tile < NVFP4_BLOCK or tile & (tile - 1):
        raise ValueError(f"tiles are a power of two from {NVFP4_BLOCK} on, along channels or tokens: {tile}, {along!r}")
    if mean is not None:
        num_tiles = -(-x.shape[2] // tile)
        check_mean(mean, x, (1 if mean.shape[2] == 1 else num_tiles,))
    return Nvfp4(*nvfp4_op(x, mean, tile, along))


def largest_of_channels(x: Float[Tensor, "b h l d"]) -> Float[Tensor, "b h d"]:
    """The largest magnitude of each channel over the tokens, float32; 0 where there is no token, NaN where one is."""
    if x.shape[2] == 0:
        return x.new_zeros((*x.shape[:2], x.shape[3]), dtype=torch.float32)
    return torch.linalg.vector_norm(x, torch.inf, dim=2).float()  # one pass, where x.abs().amax() would be two


def check_mean(mean: Tensor, x: Tensor, rows: tuple[int, ...]) -> None:
    """Raise ValueError unless a mean has the shape (b, h, *rows, d) and lies beside x: a kernel would read past it."""
    b, h, _, d = x.shape
    if mean.shape != (b, h, *rows, d) or mean.device != x.device:
        raise ValueError(
            f"x of shape {tuple(x.shape)} on {x.device} needs a mean of shape {(b, h, *rows, d)} there, got "
            f"{tuple(mean.shape)} on {mean.device}"
        )


@torch.library.custom_op("diffusion_opt::quantize_tokens", mutates_args=())
def tokens_op(x: Tensor, mean: Tensor | None, to: str, window: int, groups: int, run: int) -> tuple[Tensor, Tensor]:
    """Codes and scales; the three numbers are those of `ScaleGroups`."""
    sharing = ScaleGroups(window, groups, run)
    if runtime.mode(x) == "reference":
        codes, scales = reference.quantize_tokens(x, to, sharing, mean)
        return codes.contiguous(), scales
    from diffusion_opt.kernels.quantizers.kernel import launch_tokens

    codes = torch.empty(x.shape, dtype=CODE_TYPES[to], device=x.device)
    scales = torch.empty(*x.shape[:2], sharing.num_scales(x.shape[2]), dtype=torch.float32, device=x.device)
    launch_tokens(x, None if mean is None else mean.contiguous(), sharing, codes, scales)
    return codes, scales


@tokens_op.register_fake
def _(x: Tensor, mean: Tensor | None, to: str, window: int, groups: int, run: int) -> tuple[Tensor, Tensor]:
    num_scales = ScaleGroups(window, groups, run).num_scales(x.shape[2])
    return x.new_empty(x.shape, dtype=CODE_TYPES[to]), x.new_empty(*x.shape[:2], num_scales, dtype=torch.float32)


@torch.library.custom_op("diffusion_opt::quantize_channels", mutates_args=())
def channels_op(x: Tensor, scales: Tensor) -> Tensor:
    """e4m3 codes for given scales of channels (b, h, d)."""
    codes = _tokens_as_neighbors(x)
    if runtime.mode(x) == "reference":
        return codes.copy_(reference.channel_codes(x, scales))
    from diffusion_opt.kernels.quantizers.kernel import launch_channels

    launch_channels(x, scales, codes)
    return codes


@channels_op.register_fake
def _(x: Tensor, scales: Tensor) -> Tensor:
    return _tokens_as_neighbors(x)


def _tokens_as_neighbors(x: Tensor) -> Tensor:
    """Uninitialized e4m3 codes (b, h, l, d) of which the tokens are neighbors, each channel aligned to 16 bytes."""
    b, h, length, d = x.shape
    aligned = -(-length // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT
    return x.new_empty(b, h, d, aligned, dtype=torch.float8_e4m3fn).mT[:, :, :length]


@torch.library.custom_op("diffusion_opt::quantize_nvfp4", mutates_args=())
def nvfp4_op(x: Tensor, mean: Tensor | None, tile: int, along: str) -> tuple[Tensor, Tensor]:
    """Values and scales of tiles."""
    values, scales = _nvfp4_like(x, tile)
    if runtime.mode(x) == "reference":
        exact = reference.quantize_nvfp4(x, tile, along, mean)
        return values.copy_(exact.values), exact.scales
    from diffusion_opt.kernels.quantizers.kernel import launch_nvfp4

    launch_nvfp4(x, None if mean is None else mean.contiguous(), tile, along == "tokens", values, scales)
    return values, scales


@nvfp4_op.register_fake
def _(x: Tensor, mean: Tensor | None, tile: int, along: str) -> tuple[Tensor, Tensor]:
    return _nvfp4_like(x, tile)


def _nvfp4_like(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    num_tiles = -(-x.shape[2] // tile)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], num_tiles, dtype=torch.float32)
