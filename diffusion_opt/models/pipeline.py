"""A small FLUX.2: the stock transformer and the stock klein pipeline, on pixels and class names.

Nothing of FLUX.2 is forked. The transformer is diffusers' `Flux2Transformer2DModel`, the denoising loop, guidance,
callbacks, LoRA, caches and attention backends are those of `Flux2KleinPipeline`. Two parts are ours, because a laptop
has neither a VAE nor a text encoder to spare:

    PixelShuffleVAE    a "VAE" without parameters: latents are pixels, factor x factor of them folded into channels
    ClassEmbedder      a "text encoder" that is a table: one token a class, the last row for "no class" (guidance)

Together with the 2x2 packing of FLUX.2 a folding factor of 2 gives one token for each 4x4 patch. `TinyFlux2Pipeline`
overrides `encode_prompt`, unpacks a batch at once, and fills in the settings its weights were made for;
`Flux2KleinPipeline` itself opens the same folder (with `text_encoder=None, tokenizer=None`) and gives the same pictures
from the same embeddings.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, Flux2KleinPipeline, Flux2Transformer2DModel, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_opt.models.flow_map import fixed_guidance, scheduled_jumps
from diffusion_opt.models.ladder import ladder_of, seeded_steps


class PixelShuffleVAE(ModelMixin, ConfigMixin):
    """Pixels (B, C, H, W) in [-1, 1] <-> latents (B, C f^2, H / f, W / f), exactly invertible.

    As in diffusers' autoencoders the depth gives the scale: f = 2 ** (len(block_out_channels) - 1). Together with
    `bn` (an identity here) and `batch_norm_eps` that is all `Flux2KleinPipeline` reads of a VAE.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        block_out_channels: Sequence[int] = (1, 1),
        sample_size: int = 28,
        batch_norm_eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(block_out_channels) - 1)
        self.bn = nn.BatchNorm2d(in_channels * self.factor**2 * 4, affine=False, eps=batch_norm_eps)

    def encode(self, x: Float[Tensor, "b c h w"], return_dict: bool = True) -> SimpleNamespace:
        """Fold pixels into channels; the result has `latents`, as diffusers' encoders have."""
        return SimpleNamespace(latents=F.pixel_unshuffle(x, self.factor))

    def decode(self, z: Float[Tensor, "b c h w"], return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Unfold channels into pixels."""
        x = F.pixel_shuffle(z, self.factor)
        return DecoderOutput(sample=x) if return_dict else (x,)


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One learned token a class, (B,) labels -> (B, 1, dim); label `len(class_names)` means "no class"."""

    @register_to_config
    def __init__(self, class_names: Sequence[str] = (), dim: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(len(class_names) + 1, dim)

    @property
    def num_classes(self) -> int:
        return len(self.config.class_names)

    def labels(self, prompt: str | int | list[str | int]) -> Int[Tensor, " b"]:
        """Labels (B,) of prompts: a class name, its number (3 or "3"), or "" for no class.

        Raises ValueError naming the prompt that is none of these, or if there is no prompt at all.
        """
        names = {name.lower(): i for i, name in enumerate(self.config.class_names)}
        names |= {str(i): i for i in range(self.num_classes)} | {"": self.num_classes}
        prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
        if not prompts:
            raise ValueError('got an empty list of prompts: give at least one, [""] for one picture of no class')
        for p in prompts:
            if str(p).lower() not in names:
                raise ValueError(f"unknown prompt {p!r}: use a class number 0 … {self.num_classes - 1} or one of "
                                 f"{', '.join(self.config.class_names)}")  # fmt: skip
        return torch.tensor([names[str(p).lower()] for p in prompts])

    def forward(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b 1 d"]:
        return self.table(labels)[:, None]


class TinyFlux2Pipeline(Flux2KleinPipeline):
    """Class names to images: `pipe("sneaker").images[0]`, or `pipe(["bag", "coat"], generator=g, output_type="pt")`.

    Steps and guidance scale default to what the weights were trained for (`default_steps`, `default_guidance` in
    `model_index.json`). With `flow_map` each pass is told how far to jump; with `guidance_range` (lowest, highest) the
    scale is an input of the network, one pass a step; with `ladders` only the step counts and times of training are
    served (`ladder.py`). The rest of the call is that of `Flux2KleinPipeline`. Images are (B, 1, H, W) in [0, 1] for
    `output_type="pt"`, PIL images otherwise.
    """

    _optional_components: ClassVar = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        vae: PixelShuffleVAE,
        transformer: Flux2Transformer2DModel,
        class_embedder: ClassEmbedder,
        text_encoder: None = None,
        tokenizer: None = None,
        is_distilled: bool = False,
        default_steps: int = 50,
        default_guidance: float = 1.0,
        flow_map: bool = False,
        ladders: Sequence[Sequence[float]] | None = None,
        guidance_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=is_distilled,
        )
        self.register_modules(class_embedder=class_embedder)
        self.register_to_config(
            default_steps=default_steps,
            default_guidance=default_guidance,
            flow_map=flow_map,
            ladders=ladders,
            guidance_range=guidance_range,
        )
        self.default_sample_size = vae.config.sample_size // self.vae_scale_factor

    def encode_prompt(
        self,
        prompt: str | int | list[str | int] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Float[Tensor, "b 1 d"] | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b 1 4"]]:
        """Class tokens (B, 1, dim) and their position ids (B, 1, 4), all zero. Raises ValueError as `labels` does."""
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self.class_embedder(self.class_embedder.labels("" if prompt is None else prompt).to(device))
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, torch.zeros(*prompt_embeds.shape[:2], 4, device=device)

    @staticmethod
    def _unpack_latents_with_ids(
        x: Float[Tensor, "b n c"], x_ids: Float[Tensor, "b n 4"] | Int[Tensor, "b n 4"], height: int, width: int
    ) -> Float[Tensor, "b c h w"]:
        """Tokens back to a grid by their ids, as the parent does one image after the other, for the whole batch."""
        cells = (x_ids[..., 1] * width + x_ids[..., 2]).long()
        grid = torch.zeros(len(x), height * width, x.shape[2], dtype=x.dtype, device=x.device)
        grid.scatter_(1, cells[..., None].expand_as(x), x)
        return grid.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def __call__(
        self,
        prompt: str | int | list[str | int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        **kwargs: Any,
    ):
        """Generate images; arguments and result as in `Flux2KleinPipeline.__call__`, with `prompt` first.

        Raises ValueError for a step count or a guidance scale the weights were not made for.
        """
        config = self.config
        steps = config.default_steps if num_inference_steps is None else num_inference_steps
        if num_inference_steps is None and kwargs.get("sigmas") is not None:
            steps = len(kwargs["sigmas"])
        scale = config.default_guidance if guidance_scale is None else guidance_scale
        if isinstance(prompt, int):
            prompt = [prompt]
        if config.ladders is not None:
            kwargs["sigmas"] = ladder_of(config.ladders, steps, kwargs.get("sigmas"))
        with ExitStack() as during:
            during.enter_context(seeded_steps(self.scheduler, kwargs.get("generator")))
            if config.flow_map:
                during.enter_context(scheduled_jumps(self.transformer, self.scheduler))
            if config.guidance_range is not None:
                low, high = config.guidance_range
                if not low <= scale <= high:
                    raise ValueError(f"this student was trained for guidance {low:g} … {high:g}, got {scale:g}")
                during.enter_context(fixed_guidance(self.transformer, scale))
                scale = 1.0  # it is in the network; no second pass
            return super().__call__(prompt=prompt, num_inference_steps=steps, guidance_scale=scale, **kwargs)
