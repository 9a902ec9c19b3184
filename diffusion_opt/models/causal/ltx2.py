"""The same layouts over a stock `LTX2VideoTransformer3DModel`, through the mask and coordinates that it takes itself.

LTX-2 accepts a mask over its video tokens (`video_self_attention_mask`), a time for each token and coordinates, so
nothing is replaced, in training and in use. A stream has no key-value cache here: each chunk is one pass over the
chunks that it sees, clean ones at t = 0, which costs what the window holds. Sound is left out, one silent token with
`isolate_modalities`: its stream sees all video tokens and would carry the future into the past.

Positions are those in the list of chunks that a row sees (`layout.py`); the class takes one coordinate for each token,
so a sink behind a gap, for which two rows would need two, is refused in a pass over many rows and served in a stream.
"""

import torch
from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.models.causal.layout import Layout, check_window, kept


class CausalLTX2:
    """Chunks of latents (c, f, h, w) through a stock LTX-2. Raises ValueError for another class."""

    def __init__(self, transformer: LTX2VideoTransformer3DModel, window: int | None = None, sink: int = 0) -> None:
        check_window(window, sink)
        if not isinstance(transformer, LTX2VideoTransformer3DModel):
            raise ValueError(f"an LTX2VideoTransformer3DModel is wanted here, got {type(transformer).__name__}")
        self.transformer, self.window, self.sink = transformer, window, sink

    def __call__(
        self,
        x: Float[Tensor, "b r c f h w"],
        t: Float[Tensor, "b r"],
        text: Float[Tensor, "b l d"],
        layout: Layout,
    ) -> Float[Tensor, "b r c f h w"]:
        """The prediction for each chunk at its own time.

        Raises ValueError for a layout of another number of rows, or one in which a row would need two positions.
        """
        rows, (frames, height, width) = x.shape[1], x.shape[3:]
        if layout.num_rows != rows:
            raise ValueError(f"the layout has {layout.num_rows} rows, and {rows} chunks came")
        config = self.transformer.config
        grid = (frames // config.patch_size_t, height // config.patch_size, width // config.patch_size)
        tokens, device = grid[0] * grid[1] * grid[2], x.device
        mask = torch.zeros(rows, rows)
        for row, seen in enumerate(layout.sees):
            mask[row, list(seen)] = 1
        mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)
        places = _places(layout)
        base = self.transformer.rope.prepare_video_coords(len(x), (max(places) + 1) * grid[0], *grid[1:], device)
        base = base.unflatten(2, (-1, tokens))[:, :, places].flatten(2, 3)
        flat = LTX2Pipeline._pack_latents(x.flatten(0, 1), config.patch_size, config.patch_size_t)
        flat = flat.unflatten(0, (-1, rows)).flatten(1, 2)
        silent = torch.zeros(len(x), 1, config.audio_in_channels, device=device, dtype=x.dtype)
        quiet = torch.zeros(len(x), 1, text.shape[-1], device=device, dtype=text.dtype)
        time = config.timestep_scale_multiplier * t.repeat_interleave(tokens, 1)
        out = self.transformer(
            hidden_states=flat, audio_hidden_states=silent, encoder_hidden_states=text,
            audio_encoder_hidden_states=quiet, timestep=time, audio_timestep=time[:, :1], sigma=time[:, 0],
            audio_sigma=time[:, 0], num_frames=rows * grid[0], height=grid[1], width=grid[2], audio_num_frames=1,
            video_coords=base, isolate_modalities=True, video_self_attention_mask=mask.expand(len(x), -1, -1),
            return_dict=False,
        )[0]  # fmt: skip
        out = out.unflatten(1, (rows, tokens)).flatten(0, 1)
        out = LTX2Pipeline._unpack_latents(out, *grid, config.patch_size, config.patch_size_t)
        return out.unflatten(0, (-1, rows))

    def denoise(
        self, x: Float[Tensor, "b c f h w"], t: float, text: Float[Tensor, "b l d"], past: list[Tensor]
    ) -> Float[Tensor, "b c f h w"]:
        """The prediction for the chunk after the clean ones in `past`, of which those that it sees are computed again.

        They see one another block-causally, in the order in which they are kept.
        """
        chunks = [past[j] for j in kept(len(past), self.window, self.sink)[:-1]] + [x]
        times = torch.tensor([0.0] * (len(chunks) - 1) + [t], device=x.device).expand(len(x), -1)
        return self(torch.stack(chunks, 1), times, text, Layout.causal(len(chunks)))[:, -1]


def _places(layout: Layout) -> list[int]:
    """One position for each row, such that all distances in the layout's lists are right."""
    places = [-1] * layout.num_rows
    for seen in sorted(layout.sees, key=len):
        known = next((places[row] - i for i, row in enumerate(seen) if places[row] >= 0), 0)
        for i, row in enumerate(seen):
            if places[row] not in (-1, known + i):
                raise ValueError(
                    "LTX-2 takes one position for a token, and this layout needs two for one chunk: use sink=0, or no "
                    "window, or a chunk at a time"
                )
            places[row] = known + i
    return places
