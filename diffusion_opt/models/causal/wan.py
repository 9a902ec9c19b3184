"""A stock `WanTransformer3DModel` that makes a video chunk by chunk, with a key-value cache. Its weights stay.

    causal = CausalWan(transformer, window=6, sink=1)
    v = causal(x, t, text, Layout.causal(8, 6, 1))              training: x (b, 8, c, f, h, w), t (b, 8)
    cache = causal.new_cache()
    v = causal.denoise(x, t, text, cache)                       use: one chunk that sees the cache
    causal.write(clean, text, cache)                            a finished chunk, at t = 0, is kept
    v = causal.write_and_denoise(clean, text, x, t, next_text, cache)      both in one pass
    causal.remove()

diffusers has no key-value cache and no causal mask for Wan. One self-attention processor for each layer brings both
(`attention.py`); rotations come from the transformer's own table, read at the places of the window. The fused pass puts
the finished chunk and the next one into one batch of two items: the next one sees the keys that the finished one makes
in the same layer, so the result is that of two passes, and weights are read once.
"""

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.models.causal.attention import Board, ChunkAttention, Pass
from diffusion_opt.models.causal.key_values import ChunkCache, Precision
from diffusion_opt.models.causal.layout import Layout, check_window, kept
from diffusion_opt.models.wan import TIME_SCALE


class CausalWan:
    """See the module's head. `window` and `sink` count chunks. Raises ValueError for what it cannot serve."""

    def __init__(self, transformer: WanTransformer3DModel, window: int | None = None, sink: int = 0) -> None:
        check_window(window, sink)
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(f"a WanTransformer3DModel is made causal here, got {type(transformer).__name__}")
        if transformer.config.image_dim is not None:
            raise ValueError(
                "this Wan transformer reads picture embeddings in its cross-attention, which have no chunk: "
                "use a text-to-video model, or one that takes pictures in its channels alone"
            )
        others = [type(b.attn1.processor).__name__ for b in transformer.blocks
                  if type(b.attn1.processor) is not WanAttnProcessor]  # fmt: skip
        if others:
            raise ValueError(f"self-attention is served by {others[0]} already: remove that technique first")
        self.transformer, self.window, self.sink = transformer, window, sink
        self.board = Board()
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(ChunkAttention(self.board, layer, block.attn1.processor))
        self.removed = False

    def remove(self) -> None:
        """Give the stock processors back."""
        for block in self.transformer.blocks:
            if isinstance(block.attn1.processor, ChunkAttention) and block.attn1.processor.board is self.board:
                block.attn1.set_processor(block.attn1.processor.stock)
        self.removed = True

    def new_cache(self, precision: Precision = "native") -> ChunkCache:
        """An empty memory for one stream."""
        return ChunkCache(len(self.transformer.blocks), self.window, self.sink, precision)

    def __call__(
        self,
        x: Float[Tensor, "b r c f h w"],
        t: Float[Tensor, "b r"],
        text: Float[Tensor, "b r l d"],
        layout: Layout,
        cache: ChunkCache | None = None,
        written: int | None = None,
    ) -> Float[Tensor, "b r o f h w"]:
        """What the transformer predicts for each chunk at its own time, under a layout.

        With a cache the layout's first rows are the cached chunks. Raises ValueError for sizes that are no multiple of
        the patch, rows that do not fit the layout, and more places than the transformer's table of rotations has.
        """
        if self.removed:
            raise ValueError("this CausalWan was removed from its transformer; make another one")
        num_past = 0 if cache is None else len(cache.numbers)
        if len(layout.own) != x.shape[1] or max(max(one) for one in layout.sees) >= num_past + x.shape[1]:
            raise ValueError(
                f"the layout has {layout.num_rows} rows, and {x.shape[1]} chunks came (cached: {num_past})"
            )
        now = Pass(layout, x.shape[1], *self._rotations(x, layout.num_places), cache, written)
        self.board.under_way = now
        try:
            out = self.transformer(
                hidden_states=x.flatten(0, 1),
                timestep=TIME_SCALE * t.flatten(),
                encoder_hidden_states=text.flatten(0, 1),
                return_dict=False,
            )[0]
        finally:
            self.board.under_way = None
        if written is not None:
            cache.append(now.fresh)
        return out.unflatten(0, x.shape[:2])

    def denoise(
        self, x: Float[Tensor, "b c f h w"], t: float, text: Float[Tensor, "b l d"], cache: ChunkCache
    ) -> Float[Tensor, "b o f h w"]:
        """The prediction for the chunk after the cached ones, which is not kept."""
        return self._streamed([x], [t], [text], cache)[:, 0]

    def write(
        self, x: Float[Tensor, "b c f h w"], text: Float[Tensor, "b l d"], cache: ChunkCache, t: float = 0.0
    ) -> None:
        """Keep a finished chunk. `t` tells how noisy it is, for models that were trained with a noised context."""
        self._streamed([x], [t], [text], cache, written=0)

    def write_and_denoise(
        self,
        clean: Float[Tensor, "b c f h w"],
        clean_text: Float[Tensor, "b l d"],
        x: Float[Tensor, "b c f h w"],
        t: float,
        text: Float[Tensor, "b l d"],
        cache: ChunkCache,
        clean_t: float = 0.0,
    ) -> Float[Tensor, "b o f h w"]:
        """`write` and then `denoise`, in one pass."""
        return self._streamed([clean, x], [clean_t, t], [clean_text, text], cache, written=0)[:, 1]

    def _streamed(
        self, xs: list[Tensor], ts: list[float], texts: list[Tensor], cache: ChunkCache, written: int | None = None
    ) -> Float[Tensor, "b r o f h w"]:
        numbers = [*cache.numbers, *range(cache.num_seen, cache.num_seen + len(xs))]
        place = {number: index for index, number in enumerate(numbers)}
        lists = [kept(cache.num_seen + i, cache.window, cache.sink) for i in range(len(xs))]
        sees = tuple(tuple(place[number] for number in one) for one in lists)
        layout = Layout(sees, tuple(len(one) - 1 for one in lists))
        t = torch.tensor(ts, device=xs[0].device, dtype=torch.float32).expand(len(xs[0]), -1)
        return self(torch.stack(xs, 1), t, torch.stack(texts, 1), layout, cache, written)

    def _rotations(self, x: Tensor, num_places: int) -> tuple[Float[Tensor, "m n e"], Float[Tensor, "m n e"]]:
        """Cosines and sines (places, tokens per chunk, half of a head) from the transformer's own table."""
        channels, frames, height, width = x.shape[2:]
        patch, limit = self.transformer.config.patch_size, self.transformer.config.rope_max_seq_len
        if channels != self.transformer.config.in_channels or any(
            size % p for size, p in zip((frames, height, width), patch, strict=True)
        ):
            raise ValueError(
                f"a chunk is (channels, frames, height, width) with {self.transformer.config.in_channels} channels and "
                f"multiples of the patch {tuple(patch)}, got {tuple(x.shape[2:])}"
            )
        if num_places * frames // patch[0] > limit:
            raise ValueError(
                f"{num_places} chunks of {frames // patch[0]} frames are more than the {limit} positions of this "
                "transformer: use a smaller window"
            )
        whole = torch.empty(1, channels, num_places * frames, height, width, device="meta")
        rope: Callable = self.transformer.rope
        cos, sin = (table[0, :, 0].to(x.device, torch.float32) for table in rope(whole))
        return cos[:, 0::2].unflatten(0, (num_places, -1)), sin[:, 1::2].unflatten(0, (num_places, -1))
