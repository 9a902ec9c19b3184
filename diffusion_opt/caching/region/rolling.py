"""Keys and values of past frames for a causal video model: a sink and a rolling window.

A causal model makes a video chunk by chunk; a chunk attends to itself and to clean chunks before it. Those do not
change any more, so their keys and values are computed once, in one extra pass over the finished chunk at t = 0:

    denoise chunk n       o = softmax(q [K_past, K_n]^T / sqrt(d)) [V_past, V_n]      past is read, n is not stored
    clean pass, t = 0     append K_n, V_n;  if more than sink + window chunks: drop the oldest one behind the sink

The first chunks, the sink, stay: attention leans on them, and without them long videos drift (StreamingLLM, Xiao et al.
2023, arXiv 2309.17453; for video CausVid, arXiv 2412.07772, Self-Forcing, arXiv 2506.08009, StreamDiffusionV2, arXiv
2511.07399). While nothing has been dropped the result equals attention over the whole video under a block-causal mask.
This is the part on tensors; it takes keys after rotary embedding, with absolute positions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.region.slots import Precision, TokenStore, check_precision

KeyValue = tuple[Float[Tensor, "b n h d"], Float[Tensor, "b n h d"]]


class RollingKeyValues:
    """Keys and values of past chunks, for each layer of a causal model. Raises ValueError for a useless size."""

    def __init__(self, num_layers: int, sink: int, window: int, precision: Precision = "native") -> None:
        check_precision(precision)
        if num_layers < 1 or sink < 0 or window < 1:
            raise ValueError(f"need num_layers >= 1, sink >= 0, window >= 1, got {num_layers}, {sink} and {window}")
        self.num_layers, self.sink, self.window, self.precision = num_layers, sink, window, precision
        self._chunks: list[list[tuple[TokenStore, TokenStore]]] = []  # oldest first, a pair for each layer
        self._numbers: list[int] = []
        self._num_seen = 0

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers, counted from 0, of the chunks that are kept."""
        return tuple(self._numbers)

    @property
    def bytes(self) -> int:
        return sum(key.bytes + value.bytes for chunk in self._chunks for key, value in chunk)

    def append(self, layers: Sequence[KeyValue]) -> None:
        """Store a finished chunk, from its clean pass: a key and a value (b, n, h, d) for each layer.

        Raises ValueError for another number of layers.
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"a chunk needs a key and a value for each of {self.num_layers} layers, got {len(layers)}")
        self._chunks.append([tuple(TokenStore(x, self.precision) for x in pair) for pair in layers])
        self._numbers.append(self._num_seen)
        self._num_seen += 1
        if len(self._chunks) > self.sink + self.window:
            del self._chunks[self.sink], self._numbers[self.sink]

    def extended(
        self, layer: int, key: Float[Tensor, "b n h d"], value: Float[Tensor, "b n h d"]
    ) -> tuple[Float[Tensor, "b m h d"], Float[Tensor, "b m h d"]]:
        """What the chunk under way attends to in a layer: the past, then its own keys and values (not stored)."""
        past = [chunk[layer] for chunk in self._chunks]
        keys = torch.cat([*(stored.read() for stored, _ in past), key], dim=1)
        return keys, torch.cat([*(stored.read() for _, stored in past), value], dim=1)

    def reset(self) -> None:
        """A new video begins."""
        self._chunks, self._numbers, self._num_seen = [], [], 0
