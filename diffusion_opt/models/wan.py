"""`WanTransformer3DModel` as a velocity model on video latents.

Wan 2.1 (Wan team 2025, arXiv 2503.20314) is trained by flow matching and predicts e - x, our convention; its time runs
from 0 to 1000. Patches are cut inside the transformer, so latents (B, C, F, H, W) go in and come out as they are. F, H
and W are those of the VAE's latents; H and W must be multiples of the patch.

Two transformers that share the noise levels (the 14 B models of Wan 2.2) are two velocity models, one for each range.
"""

import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models.flux2 import TokenCondition
from diffusion_opt.models.prompt_table import PromptTable, text_of

TIME_SCALE = 1000


class WanVelocity(nn.Module):
    """VelocityModel over latents (B, C, F, H, W). `prompts` gives the text of labels; without it, `TokenCondition`."""

    def __init__(self, transformer: WanTransformer3DModel, prompts: PromptTable | None = None) -> None:
        super().__init__()
        self.transformer, self.prompts = transformer, prompts

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
        condition: ClassCondition | TokenCondition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c f h w"]:
        """Velocity at times t (B,). Raises ValueError without a condition, with r, and for sizes that do not fit."""
        if r is not None:
            raise ValueError("a stock Wan transformer knows one time and has no slot for a target time r")
        patch = self.transformer.config.patch_size
        if any(size % p for size, p in zip(x_t.shape[2:], patch, strict=True)):
            raise ValueError(f"latents (F, H, W) = {tuple(x_t.shape[2:])} are no multiple of the patch {tuple(patch)}")
        dtype = self.transformer.dtype
        return self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=TIME_SCALE * t,
            encoder_hidden_states=text_of(condition, self.prompts).to(dtype),
            return_dict=False,
        )[0].to(torch.promote_types(x_t.dtype, dtype))
