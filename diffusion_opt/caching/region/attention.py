"""Attention of a few tokens over all of them: attention processors that exchange K and V with a slot.

For the tokens of a pass (all, or only the active ones) a processor does what the stock one does, project, normalize,
rotate, then puts their keys and values into the slot and lets the queries attend to the whole of it:

    K_l[A] <- k_A;  V_l[A] <- v_A;      o_A = softmax(q_A K_l^T / sqrt(d)) V_l

Everything else in a block acts on each token alone, so with these processors in place the *stock* blocks, handed fewer
tokens, compute the dense result restricted to them: exactly if the other tokens have not changed, and bit for bit if
all are active. No block is rewritten, and LoRA layers, quantized linears and attention backends stay in their places.
Processors are diffusers' own door for this; `detach` puts the old ones back. diffusers' `Flux2KVAttnProcessor` does the
same with the fixed tokens of reference images.
"""

import threading

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as apply_ltx_rotary_emb
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_opt.caching.region.slots import LayerSlot
from diffusion_opt.caching.step.hooks import NO_COPY


class Board(threading.local):
    """What the processors of one transformer share in a thread: the slot of the pass under way and its rows."""

    def __init__(self) -> None:
        self.layers: list[LayerSlot] | None = None  # None: no cached pass is under way, attend as usual
        self.rows: Int[Tensor, " a"] | None = None  # of K and V that this pass computes; None: all

    def __deepcopy__(self, memo: dict) -> "Board":
        raise ValueError(NO_COPY)


class SlotProcessor:
    """Stands in for a stock processor of one layer."""

    def __init__(self, stock: object, layer: int, board: Board) -> None:
        self.stock, self.layer, self.board = stock, layer, board
        self._attention_backend = stock._attention_backend  # `set_attention_backend` finds them here
        self._parallel_config = stock._parallel_config

    def attend(
        self, query: Float[Tensor, "b q h d"], key: Float[Tensor, "b a h d"], value: Float[Tensor, "b a h d"]
    ) -> Float[Tensor, "b q hd"]:
        """Queries over all keys and values: those of this pass and, if it is partial, those of the slot."""
        if self.board.layers is not None:
            key, value = self.board.layers[self.layer].exchange(self.board.rows, key, value)
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out.flatten(2, 3).to(query.dtype)


class Flux2DoubleProcessor(SlotProcessor):
    """Double-stream blocks of FLUX.2: text before image, each with its own projections."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "b a c"],
        encoder_hidden_states: Float[Tensor, "b l c"],
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b a c"], Float[Tensor, "b l c"]]:
        image = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        text = (proj(encoder_hidden_states) for proj in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in image)
        text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in text)
        query = _joined(attn.norm_added_q(text_query), attn.norm_q(query))
        key = _joined(attn.norm_added_k(text_key), attn.norm_k(key))
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self.attend(query, key, _joined(text_value, value))
        num_text = encoder_hidden_states.shape[1]
        text_out, image_out = out.split_with_sizes([num_text, out.shape[1] - num_text], dim=1)
        return attn.to_out[1](attn.to_out[0](image_out)), attn.to_add_out(text_out)


class Flux2SingleProcessor(SlotProcessor):
    """Single-stream blocks of FLUX.2: attention and MLP in parallel, fused projections."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "b a c"],
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b a c"]:
        projected = attn.to_qkv_mlp_proj(hidden_states)
        qkv, mlp = projected.split([3 * attn.inner_dim, projected.shape[-1] - 3 * attn.inner_dim], dim=-1)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv.chunk(3, dim=-1))
        query = apply_rotary_emb(attn.norm_q(query), image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(attn.norm_k(key), image_rotary_emb, sequence_dim=1)
        return attn.to_out(_joined(self.attend(query, key, value), attn.mlp_act_fn(mlp), dim=-1))


class WanProcessor(SlotProcessor):
    """Self-attention of Wan: normalization across heads, rotary embedding of pairs."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "b a c"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b a c"]:
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        out = self.attend(_wan_rotated(query, *rotary_emb), _wan_rotated(key, *rotary_emb), value)
        return attn.to_out[1](attn.to_out[0](out))


class LTXProcessor(SlotProcessor):
    """Self-attention of LTX-Video: rotary embedding across heads."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "b a c"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b a c"]:
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key = apply_ltx_rotary_emb(query, image_rotary_emb), apply_ltx_rotary_emb(key, image_rotary_emb)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        return attn.to_out[1](attn.to_out[0](self.attend(query, key, value)))


class LTX2Processor(SlotProcessor):
    """Attention of LTX-2 over video tokens: by the video tokens themselves, and by the audio tokens that read them."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "b q c"],
        encoder_hidden_states: Float[Tensor, "b a e"] | None = None,
        attention_mask: None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b q c"]:
        video = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rotate = apply_interleaved_rotary_emb if attn.rope_type == "interleaved" else apply_split_rotary_emb
        query = rotate(attn.norm_q(attn.to_q(hidden_states)), query_rotary_emb)
        key = rotate(attn.norm_k(attn.to_k(video)), query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(video)))
        out = self.attend(query, key, value)
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


STAND_INS: dict[type, type[SlotProcessor]] = {
    Flux2AttnProcessor: Flux2DoubleProcessor,
    Flux2ParallelSelfAttnProcessor: Flux2SingleProcessor,
    WanAttnProcessor: WanProcessor,
    LTXVideoAttnProcessor: LTXProcessor,
    LTX2AudioVideoAttnProcessor: LTX2Processor,
}


def stand_in(attention: nn.Module, layer: int, board: Board) -> SlotProcessor:
    """The processor to use for a layer. Raises ValueError if there is none for its present one, or it is fused."""
    stock = attention.processor
    if type(stock) not in STAND_INS:
        raise ValueError(
            f"the region cache replaces stock attention processors ({', '.join(t.__name__ for t in STAND_INS)}), but "
            f"layer {layer} has {type(stock).__name__}: apply the region cache before what put it there"
        )
    if getattr(attention, "fused_projections", False):
        raise ValueError(f"layer {layer} has fused projections: call transformer.unfuse_qkv_projections() first")
    return STAND_INS[type(stock)](stock, layer, board)


class Exchanged:
    """Stand-ins in place of all processors, or of none if one is unknown; `restore` puts the stock ones back."""

    def __init__(self, attentions: list[nn.Module], board: Board) -> None:
        self._pairs = [(attention, stand_in(attention, layer, board)) for layer, attention in enumerate(attentions)]
        for attention, processor in self._pairs:
            attention.set_processor(processor)

    def check(self) -> None:
        """Raise ValueError if a layer has another processor by now: putting the stock one back would undo that."""
        for attention, processor in self._pairs:
            if attention.processor is not processor:
                raise ValueError(
                    f"layer {processor.layer} has {type(attention.processor).__name__} since the region cache was "
                    "applied: take off what put it there first"
                )

    def restore(self) -> None:
        for attention, processor in self._pairs:
            processor.stock._attention_backend = processor._attention_backend
            attention.set_processor(processor.stock)


def _joined(first: Tensor, second: Tensor, dim: int = 1) -> Tensor:
    return torch.cat([first, second], dim=dim)


def _wan_rotated(x: Float[Tensor, "b a h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b a h d"]:
    """Wan's rotary embedding, written there inside the processor: pairs (x1, x2) turn by the angle of their token."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)
