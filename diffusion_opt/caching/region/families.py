"""A pass over some of the tokens, for each transformer family.

With the processors of `attention.py` in place a pass over the tokens A is the ordinary pass on fewer tokens, if each
gets the position id it has in the whole:

    FLUX.2, LTX-2    take position ids (coordinates) as an argument: the stock forward, tokens and ids gathered
    Wan, LTX-Video   derive them from the shape: head, blocks and tail of the stock module called in order, with the
                     tokens gathered behind the head

What else differs is written here and nowhere else: which of the arguments are tokens, which are a condition (a change
of it changes every token), where a token lies, and how velocities of tokens become the output. Text tokens that share
the attention with the picture (FLUX.2) and audio tokens (LTX-2) are few and are always computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import (
    Flux2Transformer2DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from jaxtyping import Float, Int
from torch import Tensor, nn

Call = dict[str, Any]  # arguments of one call of the transformer by name
Forward = Callable[..., Any]  # the transformer's own


@dataclass(frozen=True, slots=True)
class Velocity:
    """Model output for the tokens of a pass, and outputs that are always computed whole (LTX-2: audio)."""

    tokens: Float[Tensor, "b a k"]
    others: tuple[Tensor, ...] = ()


class Family(Protocol):
    """What the region cache has to know of a transformer class."""

    num_layers: int  # attention layers that keep K and V
    can_skip_all: bool  # whether nothing but the tokens depends on the pass

    def attentions(self) -> list[nn.Module]:
        """Those layers, in the order of their slots."""
        ...

    def check(self, call: Call) -> None:
        """Raise ValueError, saying why, for arguments under which a pass over some tokens is not defined."""
        ...

    def tokens(self, call: Call) -> Float[Tensor, "b n c"]:
        """The model input of each token."""
        ...

    def positions(self, call: Call) -> Int[Tensor, "n 3"]:
        """Frame, row and column of each token."""
        ...

    def condition(self, call: Call) -> dict[str, Any]:
        """What every token depends on, other than the tokens and the time."""
        ...

    def rows(self, call: Call, active: Int[Tensor, " a"]) -> Int[Tensor, " r"]:
        """Rows of K and V that a pass over the active tokens computes."""
        ...

    def velocity(self, forward: Forward, call: Call, active: Int[Tensor, " a"] | None) -> Velocity:
        """The pass itself, over the active tokens (None: all)."""
        ...

    def output(self, call: Call, velocity: Velocity) -> Any:
        """What the transformer returns, from the velocity of all tokens."""
        ...


def grid_positions(frames: int, height: int, width: int, device: torch.device) -> Int[Tensor, "n 3"]:
    """Frame, row and column of a full grid in the order in which tokens are flattened."""
    axes = (torch.arange(size, device=device) for size in (frames, height, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


class _Base:
    conditions: tuple[str, ...] = ("encoder_hidden_states",)
    refused: tuple[str, ...] = ()  # arguments that must stay at None
    can_skip_all = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.num_layers = len(self.attentions())

    def attentions(self) -> list[nn.Module]:
        return [block.attn1 for block in self.module.blocks]

    def check(self, call: Call) -> None:
        for name in self.refused:
            if call.get(name) is not None:
                raise ValueError(f"the region cache does not go with {name}= on {type(self.module).__name__}")

    def tokens(self, call: Call) -> Float[Tensor, "b n c"]:
        return call["hidden_states"]

    def condition(self, call: Call) -> dict[str, Any]:
        return {name: call.get(name) for name in self.conditions}

    def rows(self, call: Call, active: Int[Tensor, " a"]) -> Int[Tensor, " r"]:
        return active

    def output(self, call: Call, velocity: Velocity) -> Any:
        plain = call.get("return_dict", True) is False
        return (velocity.tokens,) if plain else Transformer2DModelOutput(sample=velocity.tokens)


class Flux2Family(_Base):
    """FLUX.2: the stock forward on fewer tokens. Text comes first in the joint attention."""

    conditions = ("encoder_hidden_states", "img_ids", "txt_ids", "guidance", "joint_attention_kwargs")
    refused = ("kv_cache_mode",)

    def attentions(self) -> list[nn.Module]:
        return [block.attn for block in (*self.module.transformer_blocks, *self.module.single_transformer_blocks)]

    def positions(self, call: Call) -> Int[Tensor, "n 3"]:
        return _unbatched(call["img_ids"])[:, :3].long()

    def rows(self, call: Call, active: Int[Tensor, " a"]) -> Int[Tensor, " r"]:
        num_text = call["encoder_hidden_states"].shape[1]
        return torch.cat([torch.arange(num_text, device=active.device), num_text + active])

    def velocity(self, forward: Forward, call: Call, active: Int[Tensor, " a"] | None) -> Velocity:
        if active is not None:
            ids = _unbatched(call["img_ids"])[active]
            call = {**call, "hidden_states": call["hidden_states"][:, active], "img_ids": ids}
        return Velocity(forward(**{**call, "return_dict": False})[0])

    def output(self, call: Call, velocity: Velocity) -> Any:
        plain = call.get("return_dict", True) is False
        return (velocity.tokens,) if plain else Flux2Transformer2DModelOutput(sample=velocity.tokens)


def _unbatched(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids  # as FLUX.2 reads them


class LTX2Family(_Base):
    """LTX-2: the stock forward on fewer video tokens. Audio is computed whole, and reads all video tokens."""

    conditions = (
        "encoder_hidden_states",
        "audio_encoder_hidden_states",
        "encoder_attention_mask",
        "video_coords",
        "isolate_modalities",
    )
    refused = ("video_self_attention_mask", "spatio_temporal_guidance_blocks", "perturbation_mask")
    can_skip_all = False

    def attentions(self) -> list[nn.Module]:
        return [layer for block in self.module.transformer_blocks for layer in (block.attn1, block.video_to_audio_attn)]

    def positions(self, call: Call) -> Int[Tensor, "n 3"]:
        return grid_positions(call["num_frames"], call["height"], call["width"], call["hidden_states"].device)

    def velocity(self, forward: Forward, call: Call, active: Int[Tensor, " a"] | None) -> Velocity:
        if active is not None:
            call = {**call, **self._gathered(call, active)}
        tokens, *others = forward(**{**call, "return_dict": False})
        return Velocity(tokens, tuple(others))

    def _gathered(self, call: Call, active: Int[Tensor, " a"]) -> Call:
        x, coords = call["hidden_states"], call.get("video_coords")
        if coords is None:
            size = (call["num_frames"], call["height"], call["width"])
            coords = self.module.rope.prepare_video_coords(len(x), *size, x.device, fps=call.get("fps", 24.0))
        gathered = {"hidden_states": x[:, active], "video_coords": coords[:, :, active]}
        for name in ("timestep", "video_keyframes_mask"):  # may have one entry for each token
            if (given := call.get(name)) is not None and given.ndim > 1 and given.shape[1] == x.shape[1]:
                gathered[name] = given[:, active]
                if name == "timestep" and call.get("audio_timestep") is None:
                    raise ValueError("LTX-2 with a time for each video token needs audio_timestep= too")
        return gathered

    def output(self, call: Call, velocity: Velocity) -> Any:
        if call.get("return_dict", True) is False:
            return (velocity.tokens, *velocity.others)
        return AudioVisualModelOutput(sample=velocity.tokens, audio_sample=velocity.others[0])


class LTXFamily(_Base):
    """LTX-Video: head, blocks and tail of `LTXVideoTransformer3DModel` in the order of its forward."""

    conditions = ("encoder_hidden_states", "encoder_attention_mask", "rope_interpolation_scale", "video_coords")
    refused = ("attention_kwargs",)  # the scale of LoRA layers is set in the forward that is not used here

    def attentions(self) -> list[nn.Module]:
        return [block.attn1 for block in self.module.transformer_blocks]

    def positions(self, call: Call) -> Int[Tensor, "n 3"]:
        return grid_positions(call["num_frames"], call["height"], call["width"], call["hidden_states"].device)

    def velocity(self, forward: Forward, call: Call, active: Int[Tensor, " a"] | None) -> Velocity:
        module, x = self.module, call["hidden_states"]
        layout = ("num_frames", "height", "width", "rope_interpolation_scale", "video_coords")
        rotary = module.rope(x, *(call.get(name) for name in layout))
        hidden = module.proj_in(x)
        temb, embedded = module.time_embed(call["timestep"].flatten(), batch_size=len(x), hidden_dtype=hidden.dtype)
        temb, embedded = (e.view(len(x), -1, e.shape[-1]) for e in (temb, embedded))
        text = module.caption_projection(call["encoder_hidden_states"]).view(len(x), -1, hidden.shape[-1])
        mask = call.get("encoder_attention_mask")
        if mask is not None and mask.ndim == 2:
            mask = ((1 - mask.to(x.dtype)) * -10000.0).unsqueeze(1)
        if active is not None:
            hidden, rotary = hidden[:, active], tuple(part[:, active] for part in rotary)
            temb, embedded = (e if e.shape[1] == 1 else e[:, active] for e in (temb, embedded))
        for block in module.transformer_blocks:
            hidden = block(hidden, text, temb, rotary, mask)
        shift, scale = (module.scale_shift_table[None, None] + embedded[:, :, None]).unbind(dim=2)
        return Velocity(module.proj_out(module.norm_out(hidden) * (1 + scale) + shift))


class WanFamily(_Base):
    """Wan: head, blocks and tail of `WanTransformer3DModel` in the order of its forward."""

    conditions = ("encoder_hidden_states", "encoder_hidden_states_image")
    refused = ("attention_kwargs",)

    def tokens(self, call: Call) -> Float[Tensor, "b n c"]:
        return self._patches(call["hidden_states"]).flatten(4).flatten(1, 3)

    def positions(self, call: Call) -> Int[Tensor, "n 3"]:
        return grid_positions(*self._grid(call), call["hidden_states"].device)

    def velocity(self, forward: Forward, call: Call, active: Int[Tensor, " a"] | None) -> Velocity:
        module, timestep = self.module, call["timestep"]
        rotary = module.rope(call["hidden_states"])
        hidden = module.patch_embedding(call["hidden_states"]).flatten(2).transpose(1, 2).contiguous()
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        text, image = call["encoder_hidden_states"], call.get("encoder_hidden_states_image")
        temb, projected, text, image = module.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=per_token
        )
        projected = projected.unflatten(-1, (6, -1))
        text = text if image is None else torch.cat([image, text], dim=1)
        if active is not None:
            hidden, rotary = hidden[:, active], tuple(part[:, active] for part in rotary)
            if per_token is not None:
                temb, projected = temb[:, active], projected[:, active]
        for block in module.blocks:
            hidden = block(hidden, text, projected, rotary)
        shift, scale = (module.scale_shift_table + temb.unsqueeze(-2)).chunk(2, dim=-2)
        if per_token is not None:
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        hidden = (module.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        return Velocity(module.proj_out(hidden))

    def output(self, call: Call, velocity: Velocity) -> Any:
        patch = self.module.config.patch_size
        x = velocity.tokens.unflatten(1, self._grid(call)).unflatten(-1, (*patch, -1))
        sample = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        plain = call.get("return_dict", True) is False
        return (sample,) if plain else Transformer2DModelOutput(sample=sample)

    def _grid(self, call: Call) -> tuple[int, int, int]:
        size, patch = call["hidden_states"].shape[2:], self.module.config.patch_size
        return tuple(length // step for length, step in zip(size, patch, strict=True))

    def _patches(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b t y x c pt py px"]:
        for axis, step in zip((2, 4, 6), self.module.config.patch_size, strict=True):
            x = x.unflatten(axis, (-1, step))
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


FAMILIES: dict[type[nn.Module], type[_Base]] = {
    Flux2Transformer2DModel: Flux2Family,
    LTX2VideoTransformer3DModel: LTX2Family,
    LTXVideoTransformer3DModel: LTXFamily,
    WanTransformer3DModel: WanFamily,
}


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer. Raises ValueError naming the class if there is none."""
    for known, family in FAMILIES.items():
        if isinstance(transformer, known):
            return family(transformer)
    hint = " (apply the region cache before torch.compile)" if hasattr(transformer, "_orig_mod") else ""
    names = ", ".join(known.__name__ for known in FAMILIES)
    raise ValueError(f"the region cache knows {names}, got {type(transformer).__name__}{hint}")
