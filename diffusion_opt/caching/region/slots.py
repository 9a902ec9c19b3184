"""What a region cache keeps: keys and values of every token and layer, and what came in and out of the stack.

A token that is not computed again must still be *seen* by the others, so its key and value of each self-attention layer
are kept, after normalization and rotary embedding, where they depend on nothing but the token and its position id:

    slot (context, step):   K_l, V_l  (b, S, h, d_h)  for each layer l;   input x and output v of each token

    bytes = 2 L S h d_h x bytes per number      a slot; FLUX.2-dev at 1024^2 in bf16: see `planner.py`

Two options make that smaller. `precision` stores K and V in bf16 or in fp8 (e4m3, one scale for each token and head,
amax / 448), rounded once, when they are stored. `offload` keeps them in host memory and brings one layer at a time to
the device. diffusers' `Flux2KVCache` is the same idea for one fixed set of tokens, the reference images of
FLUX.2-klein-kv, at the model's own precision, filled once and never updated.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Precision = Literal["native", "bf16", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
FP8_MAX = 448.0  # largest number of float8_e4m3fn
SCALE_BYTES = 4  # of one token and head at fp8


def check_precision(precision: str) -> None:
    """Raise ValueError naming the choices unless this is a precision."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(PRECISIONS)} (native: the model's own), got {precision!r}"
        )


class TokenStore:
    """One tensor (b, S, h, d) whose tokens can be replaced in place, at a precision of choice."""

    def __init__(self, x: Float[Tensor, "b s h d"], precision: Precision = "native", offload: bool = False) -> None:
        check_precision(precision)
        self.precision, self.offload = precision, offload
        self.device, self.dtype = x.device, x.dtype
        self.data, self.scale = (None if part is None else self._home(part) for part in self._pack(x))

    @property
    def bytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def read(self) -> Float[Tensor, "b s h d"]:
        """All tokens, in the type and on the device they came in."""
        data = self.data.to(self.device, non_blocking=True)
        if self.scale is None:
            return data.to(self.dtype)
        return (data.float() * self.scale.to(self.device, non_blocking=True)).to(self.dtype)

    def write(self, index: Int[Tensor, " a"], x: Float[Tensor, "b a h d"]) -> None:
        """Replace the tokens at `index`."""
        data, scale = self._pack(x)
        index = index.to(self.data.device)
        _rows(self.data).index_copy_(1, index, _rows(data.to(self.data.device)))
        if scale is not None:
            self.scale.index_copy_(1, index, scale.to(self.scale.device))

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.precision == "fp8":
            scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
            return (x.float() / scale).to(torch.float8_e4m3fn), scale
        return (x.to(torch.bfloat16) if self.precision == "bf16" else x).contiguous(), None

    def _home(self, x: Tensor) -> Tensor:
        if not self.offload or x.device.type == "cpu":
            return x
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def _rows(x: Tensor) -> Tensor:
    """torch cannot copy rows of float8 by index, but it can copy bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


class LayerSlot:
    """Keys and values of one self-attention layer; empty until the first pass over all tokens."""

    def __init__(self, precision: Precision = "native", offload: bool = False) -> None:
        check_precision(precision)
        self.precision, self.offload = precision, offload
        self.key: TokenStore | None = None
        self.value: TokenStore | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.key is None else self.key.bytes + self.value.bytes

    def exchange(
        self, index: Int[Tensor, " a"] | None, key: Float[Tensor, "b a h d"], value: Float[Tensor, "b a h d"]
    ) -> tuple[Float[Tensor, "b s h d"], Float[Tensor, "b s h d"]]:
        """Store the keys and values of the tokens at `index` (None: all) and give those of all tokens.

        A pass over all tokens gets back what it handed in, unrounded: it is the dense pass, bit for bit. Raises
        ValueError if some tokens come before all have come once.
        """
        if index is None:
            self.key = TokenStore(key, self.precision, self.offload)
            self.value = TokenStore(value, self.precision, self.offload)
            return key, value
        if self.key is None:
            raise ValueError("this slot is empty: the first pass through a slot has to compute all tokens")
        self.key.write(index, key)
        self.value.write(index, value)
        return self.key.read(), self.value.read()


@dataclass(slots=True)
class Slot:
    """What is kept of one pass of the transformer, a context at a step."""

    layers: list[LayerSlot]
    timestep: Tensor  # as the transformer was given it
    tokens: Float[Tensor, "b n c"] | None = None  # model input; each token as it was when last computed
    velocity: Float[Tensor, "b n k"] | None = None  # model output of each token, from the same pass
    number: int = 0  # of the generation that last brought it up to date

    @property
    def bytes(self) -> int:
        kept = sum(x.nbytes for x in (self.tokens, self.velocity) if x is not None)
        return kept + sum(layer.bytes for layer in self.layers)

    def fill(self, tokens: Float[Tensor, "b n c"], velocity: Float[Tensor, "b n k"]) -> None:
        """All tokens were computed."""
        self.tokens, self.velocity = tokens.clone(), velocity.clone()

    def update(
        self, index: Int[Tensor, " a"], tokens: Float[Tensor, "b a c"], velocity: Float[Tensor, "b a k"]
    ) -> Float[Tensor, "b n k"]:
        """The tokens at `index` were computed; the velocity of all tokens, a copy."""
        self.tokens.index_copy_(1, index, tokens)
        self.velocity.index_copy_(1, index, velocity)
        return self.velocity.clone()
