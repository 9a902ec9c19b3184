"""`LTX2VideoTransformer3DModel` as a velocity model on video and sound together.

LTX-2 (Lightricks 2026, arXiv 2601.03233) denoises two streams in one pass: video latents (C, F, H, W) and sound, T
tokens of A numbers. A sample is both, so here it is one vector, video first:

    x = (video flattened | sound flattened),      `join` and `split` go between the two

Noise, interpolation, losses and samplers treat each number alike and need not know. The transformer takes packed tokens
and a time that runs to 1000; its prediction is e - x, our convention. Its text has two versions, one for each stream,
made by the pipeline's connectors; a condition holds them side by side, (B, L, 2 D).
"""

import math

import torch
from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models.flux2 import TokenCondition
from diffusion_opt.models.prompt_table import PromptTable, text_of


class LTX2Velocity(nn.Module):
    """VelocityModel over vectors (B, C F H W + T A); `video_shape` is (C, F, H, W), `audio_shape` (T, A)."""

    def __init__(
        self,
        transformer: LTX2VideoTransformer3DModel,
        video_shape: tuple[int, int, int, int],
        audio_shape: tuple[int, int],
        prompts: PromptTable | None = None,
        frame_rate: float = 24.0,  # frames per second of the decoded video
    ) -> None:
        super().__init__()
        self.transformer, self.prompts, self.frame_rate = transformer, prompts, frame_rate
        self.video_shape, self.audio_shape = video_shape, audio_shape
        config = transformer.config
        tokens = (config.patch_size_t, config.patch_size, config.patch_size)
        if any(size % patch for size, patch in zip(video_shape[1:], tokens, strict=True)):
            raise ValueError(f"video (F, H, W) = {video_shape[1:]} is no multiple of the patch {tokens}")
        if audio_shape[1] != config.audio_in_channels:
            raise ValueError(f"a sound token has {config.audio_in_channels} numbers here, got {audio_shape[1]}")

    @property
    def sample_shape(self) -> tuple[int]:
        """Shape of one sample, for methods that draw noise."""
        return (math.prod(self.video_shape) + math.prod(self.audio_shape),)

    def join(self, video: Float[Tensor, "b c f h w"], audio: Float[Tensor, "b t a"]) -> Float[Tensor, "b n"]:
        """Video latents and sound tokens as one vector."""
        return torch.cat([video.flatten(1), audio.flatten(1)], dim=1)

    def split(self, x: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b c f h w"], Float[Tensor, "b t a"]]:
        """The inverse of `join`. Raises ValueError for vectors of another length."""
        if x.shape[1:] != self.sample_shape:
            raise ValueError(f"a sample of {self.video_shape} and {self.audio_shape} has {self.sample_shape[0]} "
                             f"numbers, got {x.shape[1]}")  # fmt: skip
        video, audio = x.split([math.prod(self.video_shape), math.prod(self.audio_shape)], dim=1)
        return video.unflatten(1, self.video_shape), audio.unflatten(1, self.audio_shape)

    def forward(
        self,
        x_t: Float[Tensor, "b n"],
        t: Float[Tensor, " b"],
        condition: ClassCondition | TokenCondition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b n"]:
        """Velocity of both streams at times t (B,). Raises ValueError without a condition, with r, or as `split`."""
        if r is not None:
            raise ValueError("a stock LTX-2 transformer knows one time and has no slot for a target time r")
        config, dtype = self.transformer.config, self.transformer.dtype
        video, audio = self.split(x_t.to(dtype))
        video_text, audio_text = text_of(condition, self.prompts).to(dtype).chunk(2, dim=-1)
        frames, height, width = self.video_shape[1:]
        grid = (frames // config.patch_size_t, height // config.patch_size, width // config.patch_size)
        time = config.timestep_scale_multiplier * t
        video_velocity, audio_velocity = self.transformer(
            hidden_states=LTX2Pipeline._pack_latents(video, config.patch_size, config.patch_size_t),
            audio_hidden_states=audio,
            encoder_hidden_states=video_text,
            audio_encoder_hidden_states=audio_text,
            timestep=time,
            sigma=time,
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            fps=self.frame_rate,
            audio_num_frames=self.audio_shape[0],
            return_dict=False,
        )
        video = LTX2Pipeline._unpack_latents(video_velocity, *grid, config.patch_size, config.patch_size_t)
        return self.join(video, audio_velocity).to(torch.promote_types(x_t.dtype, dtype))
