"""Attention on 8-bit operands, in plain PyTorch: what the INT8 and FP8 kernels must compute, tile for tile.

Queries and keys are codes times scales (quantizers/oracle.py), so a score is an integer (or e4m3) dot product times
two scales. Weights are rounded as well, relative to the largest score met so far, which is why the oracle walks over
tiles of keys as the kernel does: another tile size or order would round other numbers.

    fp16        weights and v in float16, sums in float32
    fp16_fast   the same with the sums of a tile in float16, then added in float32: twice the speed on consumer GPUs
    fp8         e4m3(448 p) times e4m3 codes of v; tile sums in the matrix unit, which keeps about 22 bits on Hopper,
                then added in float32 (SageAttention2's two-level accumulation, arXiv 2411.10958)

In the end this is dense attention of the dequantized q, k, v with weights of a few bits: masks, empty rows and LSE are
those of `dense/oracle.py`. SageAttention's test suite is empty and its error is only ever measured against float16;
here the kernel is held to this file, and this file to the formula.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels.attention.arguments import Mask, closed_keys
from diffusion_opt.kernels.quantizers.formats import E4M3_MAX, round_e4m3
from diffusion_opt.kernels.quantizers.oracle import KEY_GROUPS, QUERY_GROUPS, Granularity, Quantized, ScaleGroups

ValuesIn = Literal["fp16", "fp16_fast", "fp8"]
LOG2_E = 1.4426950408889634


def dequantize_tokens(x: Quantized, groups: ScaleGroups, kind: torch.dtype) -> Float[Tensor, "b h l d"]:
    """The numbers that codes and scales of tokens stand for."""
    index = groups.index(x.codes.shape[2], x.codes.device)
    return x.codes.to(kind) * x.scales.to(kind)[:, :, index, None]


def attention_8bit(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    mask: Mask | None,
    scale: float,
    granularity: Granularity,
    values_in: ValuesIn,
    key_tile: int,
    kind: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lq"]]:
    """Output and natural-log LSE of the quantized scores, computed in `kind` (float64 for an oracle of the kernel).

    For the float16 kinds `v.codes` are float16 numbers, and the scales powers of two.
    """
    queries = dequantize_tokens(q, QUERY_GROUPS[granularity], kind)
    keys = dequantize_tokens(k, KEY_GROUPS[granularity], kind)
    peak = queries.new_full(queries.shape[:3], -torch.inf)
    norm, total = torch.zeros_like(peak), torch.zeros_like(queries)
    for start in range(0, keys.shape[2], key_tile):
        tile = slice(start, start + key_tile)
        scores = masked(queries @ keys[:, :, tile].mT * scale, mask, tile, keys.shape[2]) * LOG2_E
        new_peak = torch.maximum(peak, scores.amax(-1))
        origin = new_peak.masked_fill(new_peak == -torch.inf, 0)
        weights = (scores - origin[..., None]).exp2()
        correction = (peak - origin).exp2()
        norm = norm * correction + weights.sum(-1)
        total = total * correction[..., None] + _weighted(weights, v.codes[:, :, tile], values_in)
        peak = new_peak
    total = total * v.scales.to(kind)[:, :, None]
    return total / norm.masked_fill(norm == 0, 1)[..., None], (peak + norm.log2()) / LOG2_E


def masked(
    scores: Float[Tensor, "b h lq n"], mask: Mask | None, tile: slice, num_keys: int
) -> Float[Tensor, "b h lq n"]:
    """Scores of the keys in `tile` with their part of the mask, which broadcasts to (b, h, lq, num_keys)."""
    if mask is None:
        return scores
    part = mask.expand(*mask.shape[:-1], num_keys)[..., tile]
    closed = closed_keys(part)
    if mask.dtype != torch.bool:
        scores = scores + part.masked_fill(closed, 0).to(scores.dtype)
    return scores.masked_fill(closed, -torch.inf)


def _weighted(weights: Float[Tensor, "b h lq n"], v: Tensor, values_in: ValuesIn) -> Float[Tensor, "b h lq d"]:
    """The sum over a tile of rounded weights times values, unscaled for fp8."""
    kind = weights.dtype
    if values_in == "fp8":
        return round_e4m3(E4M3_MAX * weights) @ v.to(kind) / E4M3_MAX
    product = weights.half().to(kind) @ v.to(kind)
    return product.half().to(kind) if values_in == "fp16_fast" else product
