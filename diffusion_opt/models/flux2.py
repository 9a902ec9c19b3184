"""`Flux2Transformer2DModel` as a velocity model on images.

Everything particular to the FLUX.2 family lives here: how an image becomes tokens and back, the four-axis position
ids (time, row, column, place in the text), and where the guidance embedding goes. FLUX.2 takes t in [0, 1] and predicts
e - x, which is our convention, so neither times nor outputs are converted.

An image (B, C, H, W) is encoded by the VAE, packed 2x2 and flattened, exactly as `Flux2KleinPipeline` packs:

    (B, C, H, W) -> encode -> (B, c, h, w) -> pack -> (B, h w / 4, 4 c)
"""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models.pipeline import PixelShuffleVAE


@dataclass(frozen=True)
class TokenCondition:
    """Text already encoded: `tokens` (B, L, D), and `null` (1, L, D), the tokens of the empty prompt."""

    tokens: Float[Tensor, "b l d"]
    null: Float[Tensor, "1 l d"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "TokenCondition":
        return TokenCondition(self.tokens[index], self.null)

    def drop(self, mask: Bool[Tensor, " b"] | None = None) -> "TokenCondition":
        null = self.null.expand_as(self.tokens)
        return TokenCondition(null if mask is None else torch.where(mask[:, None, None], null, self.tokens), self.null)


def position_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "hw 4"]:
    """FLUX.2 ids (time, row, column, layer) of a height x width grid of tokens."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    zero = torch.zeros_like(rows)
    return torch.stack([zero, rows, columns, zero], dim=-1).flatten(0, 1).float()


class Flux2Velocity(nn.Module):
    """VelocityModel over images of a pipeline with a `Flux2Transformer2DModel`.

    `transformer` and `embedder` are the pipeline's own modules, shared and not copied: training this trains them.
    `embedder` may be None when every condition comes as a `TokenCondition`. What a transformer with `guidance_embeds`
    finds in that slot is either `guidance`, a scale (guidance-distilled models; a call may bring its own), or with
    `two_time` the length t - r of the jump (flow maps, see `flow_map.py`); all others take neither.
    """

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        embedder: nn.Module | None,
        vae: nn.Module,
        guidance: float | None = None,
        two_time: bool = False,
    ) -> None:
        super().__init__()
        if transformer.config.guidance_embeds != (two_time or guidance is not None) or (two_time and guidance):
            wanted = "needs guidance=<scale> or two_time=True, one of them"
            needs = wanted if transformer.config.guidance_embeds else "takes no guidance and no second time"
            raise ValueError(f"this transformer {needs}: guidance_embeds is {transformer.config.guidance_embeds}")
        self.transformer = transformer
        self.embedder = embedder
        self.guidance = guidance
        self.two_time = two_time
        self._vae = [vae]  # in a list, so that the VAE is no submodule: it is frozen and not trained or saved with us

    def tokens(self, condition: ClassCondition | TokenCondition) -> Float[Tensor, "b l d"]:
        """The text stream (B, L, D) of a condition. Raises TypeError for a condition of another family."""
        if isinstance(condition, TokenCondition):
            return condition.tokens
        if isinstance(condition, ClassCondition) and self.embedder is not None:
            return self.embedder(condition.labels)
        raise TypeError(f"Flux2Velocity takes a ClassCondition or a TokenCondition, got {type(condition).__name__}")

    def pack(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n k"], tuple[int, int]]:
        """Image -> tokens (B, n, k) and the token grid (rows, columns)."""
        latents = Flux2KleinPipeline._patchify_latents(self._vae[0].encode(x).latents)
        return Flux2KleinPipeline._pack_latents(latents), tuple(latents.shape[-2:])

    def unpack(self, tokens: Float[Tensor, "b n k"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        """Tokens -> image, the inverse of `pack`."""
        latents = tokens.transpose(1, 2).unflatten(2, grid)
        return self._vae[0].decode(Flux2KleinPipeline._unpatchify_latents(latents)).sample

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        condition: ClassCondition | TokenCondition | None = None,
        r: Float[Tensor, " b"] | None = None,
        guidance: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Velocity (B, C, H, W) at times t (B,), or the mean velocity of the jump from t to r for a flow map.

        `guidance` is a scale for each sample, for models with a scale in the slot. Raises ValueError without a
        condition, with a target time r for a model that knows one time, or with a scale for one that takes none.
        """
        if condition is None:
            raise ValueError("FLUX.2 always has a text stream: pass condition.drop() for no condition, not None")
        if r is not None and not self.two_time:
            raise ValueError("a stock FLUX.2 transformer knows one time; a target time r needs a flow-map student")
        if guidance is not None and self.guidance is None:
            raise ValueError("this transformer takes no guidance scale; a guidance-distilled student does")
        hidden_states, grid = self.pack(x_t)
        text = self.tokens(condition)
        txt_ids = Flux2KleinPipeline._prepare_text_ids(text[:1])[0].to(x_t.device, torch.float32)
        slot = guidance
        if slot is None and self.guidance is not None:
            slot = torch.full_like(t, self.guidance)
        if self.two_time:
            slot = torch.zeros_like(t) if r is None else t - r
        velocity = self.transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=text,
            timestep=t.to(x_t.dtype),
            img_ids=position_ids(*grid, device=x_t.device),
            txt_ids=txt_ids,
            guidance=slot,
            return_dict=False,
        )[0]
        return self.unpack(velocity, grid)


def velocity_model(pipe: DiffusionPipeline, guidance: float | None = None) -> Flux2Velocity:
    """The pipeline's transformer as a `VelocityModel` on images in [-1, 1].

    `guidance` as in `Flux2Velocity`; a student with a `guidance_range` takes its default scale if none is given.
    Raises TypeError for a pipeline whose transformer family has no adapter yet, or whose VAE is a network: velocities
    live where noise is added, and that would then be its latents, not pixels.
    """
    if not isinstance(pipe.transformer, Flux2Transformer2DModel):
        raise TypeError(
            f"no velocity adapter for {type(pipe.transformer).__name__} yet; Flux2Transformer2DModel has one"
        )
    if not isinstance(pipe.vae, PixelShuffleVAE):
        raise TypeError(f"a velocity on pixels needs a PixelShuffleVAE, got {type(pipe.vae).__name__}")
    two_time = bool(pipe.config.get("flow_map", False))
    if guidance is None and pipe.config.get("guidance_range") is not None:
        guidance = pipe.config.default_guidance
    return Flux2Velocity(pipe.transformer, getattr(pipe, "class_embedder", None), pipe.vae, guidance, two_time)
