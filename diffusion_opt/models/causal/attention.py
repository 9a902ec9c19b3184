"""Self-attention across chunks that are items of a batch: the one part of a stock Wan transformer that is replaced.

All of a Wan block but self-attention acts on a token alone, or on a token and its item's text and time. So a video of R
chunks may be a batch of R items, each with a time and an action of its own, and the stock forward serves. Here, in the
processor, items of one video meet:

    q, k, v  (B R, n, h, d) -> (B, R, n, h, d);   keys of past chunks from the cache stand before those of the pass
    row r attends to the rows layout.sees[r], each rotated by its place in that list

Gathering the rows that are seen costs no more arithmetic than a mask over all, and less with a window. Outside of a
`CausalWan` call the processor does what the stock one does.
"""

from dataclasses import dataclass, field

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.models.causal.key_values import ChunkCache
from diffusion_opt.models.causal.layout import Layout


@dataclass
class Pass:
    """What the layers must know of the pass under way."""

    layout: Layout
    num_own: int  # rows of the batch; the layout's first ones are in the cache, if there is one
    cos: Float[Tensor, "m n e"]  # rotation of the tokens of a chunk by its place
    sin: Float[Tensor, "m n e"]
    cache: ChunkCache | None = None
    written: int | None = None  # own row whose keys and values are to be kept
    fresh: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Board:
    """Where a `CausalWan` pins the pass under way for its processors."""

    def __init__(self) -> None:
        self.under_way: Pass | None = None


def rotate(x: Float[Tensor, "*b h d"], cos: Float[Tensor, "*#b e"], sin: Float[Tensor, "*#b e"]) -> Tensor:
    """Turn each pair of neighboring numbers by its angle. Their order within a head is another than in the stock code.

    Queries and keys are reordered alike, so their products are the same.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class ChunkAttention:
    """See the module's head. One for each layer, all with one board."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, board: Board, layer: int, stock: WanAttnProcessor) -> None:
        self.board, self.layer, self.stock = board, layer, stock

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        now = self.board.under_way
        if now is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = _projected(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).unflatten(0, (-1, now.num_own)) for x in (query, key, value)
        )
        if now.written is not None:
            now.fresh.append((key[:, now.written].detach(), value[:, now.written].detach()))
        if now.cache is not None and now.cache.numbers:
            past_keys, past_values = now.cache.read(self.layer)
            key = torch.cat([torch.stack(past_keys, 1), key], 1)
            value = torch.cat([torch.stack(past_values, 1), value], 1)
        out = _attend(query, key, value, now).reshape(hidden_states.shape[0], -1, attn.inner_dim)
        return attn.to_out[1](attn.to_out[0](out.type_as(hidden_states)))


def _projected(attn: WanAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.fused_projections:
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _attend(
    query: Float[Tensor, "b r n h d"], key: Float[Tensor, "b s n h d"], value: Float[Tensor, "b s n h d"], now: Pass
) -> Float[Tensor, "b r n hd"]:
    """Attention of each own row to the rows that it sees."""
    layout, device = now.layout, query.device
    own = torch.tensor(layout.own, device=device)
    query = rotate(query, now.cos[own], now.sin[own]).to(value.dtype)
    places = layout.num_places
    if layout.shared:
        rows = torch.tensor(layout.sees[0], device=device)
        keys, values = key[:, rows], value[:, rows]
        keys = rotate(keys, now.cos[:places], now.sin[:places]).to(value.dtype)
        query, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (query, keys, values))
        out = F.scaled_dot_product_attention(query, keys, values)
        return out.transpose(1, 2).flatten(2).unflatten(1, (layout.num_rows, -1))
    index = layout.index.to(device)
    keys, values = key[:, index], value[:, index]  # (b, r, m, n, h, d)
    keys = rotate(keys, now.cos[:places], now.sin[:places]).to(value.dtype)
    num_tokens = query.shape[2]
    mask = None
    if not bool(layout.seen.all()):
        mask = layout.seen.to(device).repeat_interleave(num_tokens, 1)[:, None, None]
        mask = mask.expand(-1, 1, num_tokens, -1).repeat(len(query), 1, 1, 1)
    query = query.flatten(0, 1).transpose(1, 2)
    keys, values = (x.flatten(2, 3).flatten(0, 1).transpose(1, 2) for x in (keys, values))
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return out.transpose(1, 2).flatten(2).unflatten(0, (-1, layout.num_rows))
