"""A small FLUX.2 with all of its networks: text encoder, transformer and autoencoder, in the stock pipeline.

`Flux2KleinPipeline` itself is what is built, saved and called; there is no subclass. What the small networks need to be
called with (size, length of a prompt, layers of the text encoder, steps, guidance) are defaults of the call that
`call_defaults.py` keeps in `call.json` beside `model_index.json`, so `load` fills them in, and

    Flux2KleinPipeline.from_pretrained(folder)(prompt, **json.loads((folder / "call.json").read_text()))

gives the same pictures to the bit. `TextVelocity` is what trains: transformer and text encoder as one velocity model on
packed latents, conditioned on token numbers, so the text encoder learns from the diffusion loss itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast

from diffusion_opt.models.call_defaults import set_call_defaults
from diffusion_opt.models.flux2 import position_ids
from diffusion_opt.models.patch_latents import PATCH, PatchPCA, encoder_widths, put_into
from diffusion_opt.models.text_encoder import TextEncoderConfig, build_text_encoder, encoded, token_ids


@dataclass(frozen=True, slots=True)
class TextToImageConfig:
    """The size of the three networks; the rest follows from it."""

    image_size: int = 128  # pixels a side; a multiple of 16: a token is 2 x 2 cells of 8 x 8 pixels
    channels: int = 32  # of a latent
    num_heads: int = 3
    head_dim: int = 64
    num_double: int = 2
    num_single: int = 4
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    decoder_widths: tuple[int, int, int, int] = (8, 16, 32, 64)  # from full size down to an eighth
    decoder_layers: int = 1
    norm_groups: int = 1  # more would lose the level of flat colors, which is what a picture of them is
    # What a prompt says of large areas is decided close to noise, where 64 tokens agree on it: trained at shift 1, the
    # backgrounds of pictures did not follow their prompts.
    shift: float = 3.0  # of the times, in training and in a call
    steps: int = 50  # of a call
    guidance: float = 3.0  # of a call

    def __post_init__(self) -> None:
        if self.image_size % (2 * PATCH):
            raise ValueError(f"image_size must be a multiple of {2 * PATCH} pixels, a token, got {self.image_size}")
        if self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8 (four rotary axes of even size), got {self.head_dim}")

    @property
    def call(self) -> dict[str, object]:
        """What the stock pipeline has to be called with."""
        return {
            "height": self.image_size,
            "width": self.image_size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "max_sequence_length": self.text.max_tokens,
            "text_encoder_out_layers": list(self.text.out_layers),
        }


def build_text_to_image(
    config: TextToImageConfig,
    pca: PatchPCA,
    statistics: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    tokenizer: Qwen2TokenizerFast,
    seed: int = 0,
) -> Flux2KleinPipeline:
    """A stock pipeline with fresh weights, the same for the same seed; only the encoder of pictures is finished.

    `statistics` are mean and variance of packed latents (`patch_latents.statistics`). As in DiT (Peebles & Xie 2023,
    arXiv 2212.09748, section 3.2) modulation and output start at zero. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * config.channels,
            num_layers=config.num_double,
            num_single_layers=config.num_single,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.text.text_width,
            timestep_guidance_channels=64,
            axes_dims_rope=(config.head_dim // 4,) * 4,
            guidance_embeds=False,
        )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(parameter)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift, use_dynamic_shifting=False),
        vae=build_autoencoder(config, pca, statistics, seed),
        text_encoder=build_text_encoder(tokenizer, config.text, seed),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    set_call_defaults(pipe, "size", **config.call)
    return pipe


def build_autoencoder(
    config: TextToImageConfig,
    pca: PatchPCA,
    statistics: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    seed: int = 0,
) -> AutoencoderKLFlux2:
    """A stock autoencoder: the encoder is the linear map, `bn` holds the statistics, the decoder has fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae = AutoencoderKLFlux2(
            block_out_channels=encoder_widths(config.channels),
            decoder_block_out_channels=config.decoder_widths,
            layers_per_block=config.decoder_layers,
            latent_channels=config.channels,
            norm_num_groups=config.norm_groups,
            sample_size=config.image_size,
            mid_block_add_attention=False,
        )
    put_into(vae, pca)
    vae.bn.running_mean.copy_(statistics[0])
    vae.bn.running_var.copy_(statistics[1] - vae.config.batch_norm_eps)
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True)
class PromptCondition:
    """Prompts as token numbers: `ids` and `mask` (B, L), and those of the empty prompt (1, L)."""

    ids: Int[Tensor, "b l"]
    mask: Int[Tensor, "b l"]
    null_ids: Int[Tensor, "1 l"]
    null_mask: Int[Tensor, "1 l"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index) -> "PromptCondition":
        return PromptCondition(self.ids[index], self.mask[index], self.null_ids, self.null_mask)

    def to(self, device: torch.device | str) -> "PromptCondition":
        """The same prompts on a device."""
        return PromptCondition(*(part.to(device) for part in (self.ids, self.mask, self.null_ids, self.null_mask)))

    def drop(self, mask: Bool[Tensor, " b"] | None = None) -> "PromptCondition":
        """The empty prompt in place of those where `mask` is true; without a mask of all."""
        gone = torch.ones(len(self), 1, dtype=torch.bool, device=self.ids.device) if mask is None else mask[:, None]
        ids, attended = torch.where(gone, self.null_ids, self.ids), torch.where(gone, self.null_mask, self.mask)
        return PromptCondition(ids, attended, self.null_ids, self.null_mask)


def prompt_condition(tokenizer: Qwen2TokenizerFast, prompts: list[str], length: int) -> PromptCondition:
    """The condition of prompts. Raises ValueError for one of more than `length` tokens."""
    ids, mask = token_ids(tokenizer, prompts, length)
    return PromptCondition(ids, mask, *token_ids(tokenizer, [""], length))


class TextVelocity(nn.Module):
    """VelocityModel on packed latents (B, 4 K, h, w), conditioned on a `PromptCondition`.

    The modules are the pipeline's own, shared and not copied. `text_encoder` is the encoder without its word head,
    which diffusion does not use.
    """

    def __init__(self, pipe: Flux2KleinPipeline, out_layers: Sequence[int]) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.text_encoder = pipe.text_encoder.model
        self.out_layers = tuple(out_layers)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], condition: PromptCondition | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Velocity at times t (B,). Raises ValueError without a condition: pass `condition.drop()` for none."""
        if condition is None:
            raise ValueError("FLUX.2 always has a text stream: pass condition.drop() for no condition, not None")
        text = encoded(self.text_encoder, condition.ids, condition.mask, self.out_layers)
        velocity = self.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(x_t),
            encoder_hidden_states=text,
            timestep=t,
            img_ids=position_ids(*x_t.shape[-2:], device=x_t.device),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text[:1])[0].to(x_t.device, torch.float32),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, tuple(x_t.shape[-2:]))
