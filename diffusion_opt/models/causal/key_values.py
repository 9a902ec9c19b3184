"""Keys and values of past chunks, before their rotation: a sink and a rolling window, in full precision or 8 bits.

A finished chunk does not change, so its keys and values are computed once and kept for those after it. They are kept
before the rotary embedding and rotated by their place in the window when they are read (`layout.py`). In 8 bits each
token and head has a scale of its own, amax / 127 for INT8 and amax / 448 for FP8 (e4m3); reading multiplies back.

    bytes = 2 L (sink + window - 1) n h d x bytes per number,     n tokens per chunk, h heads of d, L layers
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.models.causal.layout import check_window, kept

Precision = Literal["native", "int8", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
LARGEST = {"int8": 127.0, "fp8": 448.0}


class Stored:
    """A tensor of keys or values (b, n, h, d) at a precision of choice."""

    def __init__(self, x: Float[Tensor, "b n h d"], precision: Precision = "native") -> None:
        self.dtype, self.scale, self.data = x.dtype, None, x
        if precision != "native":
            self.scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST[precision]
            scaled = x.float() / self.scale
            self.data = scaled.round().to(torch.int8) if precision == "int8" else scaled.to(torch.float8_e4m3fn)

    @property
    def bytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def read(self) -> Float[Tensor, "b n h d"]:
        """The tensor in the type it came in."""
        return self.data if self.scale is None else (self.data.float() * self.scale).to(self.dtype)


class ChunkCache:
    """What a stream remembers: for each kept chunk a key and a value of each layer."""

    def __init__(
        self, num_layers: int, window: int | None = None, sink: int = 0, precision: Precision = "native"
    ) -> None:
        check_window(window, sink)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.num_layers, self.window, self.sink, self.precision = num_layers, window, sink, precision
        self.numbers: list[int] = []
        self.num_seen = 0
        self._chunks: list[list[tuple[Stored, Stored]]] = []

    @property
    def bytes(self) -> int:
        return sum(key.bytes + value.bytes for chunk in self._chunks for key, value in chunk)

    def append(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the next chunk and forget what no later one sees. Raises ValueError for another number of layers."""
        if len(layers) != self.num_layers:
            raise ValueError(f"a chunk has a key and a value for each of {self.num_layers} layers, got {len(layers)}")
        self._chunks.append([(Stored(key, self.precision), Stored(value, self.precision)) for key, value in layers])
        self.numbers.append(self.num_seen)
        self.num_seen += 1
        wanted = set(kept(self.num_seen, self.window, self.sink))
        staying = [i for i, number in enumerate(self.numbers) if number in wanted]
        self._chunks, self.numbers = [self._chunks[i] for i in staying], [self.numbers[i] for i in staying]

    def read(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (b, n, h, d) of the kept chunks in a layer, oldest first."""
        pairs = [chunk[layer] for chunk in self._chunks]
        return [key.read() for key, _ in pairs], [value.read() for _, value in pairs]
