"""Which numbers share a scale: the quantizers of q, k and v for low-precision attention, in plain PyTorch.

INT8 and FP8 codes are x / s, rounded, with s = max|x| / 127 (or 448) over the tokens that share the scale, all channels
of the head:

    block    128 queries, or 128 keys: SageAttention (Zhang et al. 2024, arXiv 2410.02367) has 64, but then the matrix
             products of half as many keys are rescaled one by one, and the error hardly differs
    thread   queries r with equal r mod 8 inside each 32: 4 of them; keys with equal (r mod 8) // 2 inside each 64: 16
             (SageAttention2, Zhang et al. 2024, arXiv 2411.10958). In the registers of a matrix unit's result each
             thread holds just such rows and columns, so in CUDA the finer scale costs no extra load. Triton does not
             say which thread holds what: here it costs a load and a multiplication per score.

Values get a scale for each channel, over all tokens: it leaves the sum over keys as a common factor.

Smoothing subtracts a mean before rounding. All keys may lose one vector, mean_j k_j: every score of a query changes by
the same number, which softmax ignores (the LSE has to be corrected by scale q . mean). What remains is what tells keys
apart, and the channel bias that would have used up the codes is gone. Queries lose the mean of their block of 128; the
scores that belong to it, mean . k_j, differ between keys and are added back.

SageAttention's Triton quantizers read lanes past the end of a ragged tensor into scale and mean, and SageAttention3's
subtracts the mean from the caller's own tensor; here neither can happen.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.kernels.quantizers.formats import (
    E4M3_MAX,
    INT8_MAX,
    NVFP4_BLOCK,
    Nvfp4,
    nonzero,
    nvfp4_tiles,
    round_int8,
)

Granularity = Literal["block", "thread"]
EightBit = Literal["int8", "fp8"]
QUERY_BLOCK = 128  # queries that share a scale, or the mean that smoothing takes off
KEY_BLOCK = 64  # keys that share an NVFP4 scale; also the tile that FP4 attention rounds its weights in
EIGHT_BIT_KEYS = 128  # keys that share a scale in 8 bits, and the tile in which the oracle rounds weights


@dataclass(frozen=True, slots=True)
class ScaleGroups:
    """Which tokens share a scale: token r has scale (r // window) groups + r mod (groups run) // run."""

    window: int
    groups: int
    run: int

    def index(self, num_tokens: int, device: torch.device | str = "cpu") -> Int[Tensor, " l"]:
        """The number of the scale of each token."""
        token = torch.arange(num_tokens, device=device)
        return token // self.window * self.groups + token % (self.groups * self.run) // self.run

    def num_scales(self, num_tokens: int) -> int:
        return -(-num_tokens // self.window) * self.groups

    def largest(self, sizes: Float[Tensor, "*b l"]) -> Float[Tensor, "*b s"]:
        """The largest of the tokens' sizes (0 or more) in each group."""
        repeats = self.window // (self.groups * self.run)
        windows = F.pad(sizes, (0, -sizes.shape[-1] % self.window))
        return windows.unflatten(-1, (-1, repeats, self.groups, self.run)).amax((-3, -1)).flatten(-2)


QUERY_GROUPS = {"block": ScaleGroups(QUERY_BLOCK, 1, QUERY_BLOCK), "thread": ScaleGroups(32, 8, 1)}
KEY_GROUPS = {"block": ScaleGroups(EIGHT_BIT_KEYS, 1, EIGHT_BIT_KEYS), "thread": ScaleGroups(KEY_BLOCK, 4, 2)}


class Quantized(NamedTuple):
    """8-bit codes and the float32 scales they are multiplied with."""

    codes: Tensor  # (b, h, l, d), int8 or float8_e4m3fn
    scales: Float[Tensor, "b h s"]  # one for each group of tokens, or (channels) one for each d


def smoothing_mean(k: Float[Tensor, "b h l d"]) -> Float[Tensor, "b h d"]:
    """The mean over tokens that smoothing subtracts from keys, float32; 0 where there is no token."""
    return k.sum(2, dtype=torch.float32) if k.shape[2] == 0 else k.mean(2, dtype=torch.float32)


def block_means(q: Float[Tensor, "b h l d"]) -> Float[Tensor, "b h blocks d"]:
    """The mean of each block of 128 queries, float32; the last block is that of the tokens there are."""
    whole = q.shape[2] // QUERY_BLOCK * QUERY_BLOCK
    means = q[:, :, :whole].unflatten(2, (-1, QUERY_BLOCK)).mean(3, dtype=torch.float32)
    if whole == q.shape[2]:
        return means
    return torch.cat([means, q[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], dim=2)


def quantize_tokens(
    x: Float[Tensor, "b h l d"], to: EightBit, groups: ScaleGroups, mean: Float[Tensor, "b h d"] | None = None
) -> Quantized:
    """8-bit codes of x - mean with a scale for each group of tokens; scales of groups without a token are 1."""
    centered = x.float() if mean is None else x.float() - mean[:, :, None]
    scales = nonzero(groups.largest(centered.abs().amax(-1)) / (INT8_MAX if to == "int8" else E4M3_MAX))
    index = groups.index(x.shape[2], x.device)
    return Quantized(_round(centered / scales[:, :, index, None], to), scales)


def quantize_channels(x: Float[Tensor, "b h l d"]) -> Quantized:
    """e4m3 codes with a scale for each channel, over all tokens."""
    largest = x.abs().amax(2).float() if x.shape[2] else x.new_zeros((*x.shape[:2], x.shape[3]), dtype=torch.float32)
    scales = nonzero(largest / E4M3_MAX)
    return Quantized(channel_codes(x, scales), scales)


def channel_codes(x: Float[Tensor, "b h l d"], scales: Float[Tensor, "b h d"]) -> Tensor:
    """e4m3 codes (b, h, l, d) for given scales of the channels."""
    return _round(x.float() / scales[:, :, None], "fp8")


def _round(z: Float[Tensor, "*s"], to: EightBit) -> Tensor:
    return round_int8(z) if to == "int8" else z.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_nvfp4(
    x: Float[Tensor, "b h l d"],
    tile: int,
    along: Literal["channels", "tokens"],
    mean: Float[Tensor, "b h #blocks d"] | None = None,
) -> Nvfp4:
    """NVFP4 values (b, h, l, d) of x - mean and the float32 scales (b, h, tiles) of tiles of `tile` tokens.

    `mean` has one row for all tokens, or one for each tile. Blocks of 16 run along channels (for products of q and k)
    or along tokens (for products of weights and v); where 16 does not divide them, zeros are thought to follow.
    """
    length, dim = x.shape[2:]
    tiles = F.pad(x.float(), (0, -dim % NVFP4_BLOCK, 0, -length % tile)).unflatten(2, (-1, tile))
    if mean is not None:
        real = torch.arange(tiles.shape[2] * tile, device=x.device).view(-1, tile, 1) < length
        tiles = torch.where(real, tiles - F.pad(mean, (0, -dim % NVFP4_BLOCK))[:, :, :, None], 0.0)
    values, scales = nvfp4_tiles(tiles, -1 if along == "channels" else -2)
    return Nvfp4(values.flatten(2, 3)[:, :, :length, :dim], scales)
