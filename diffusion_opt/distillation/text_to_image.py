"""Train a small text-to-image pipeline from pictures: an autoencoder's decoder, and a teacher with its text encoder.

Two trainings that do not wait for one another, because the encoder is found in closed form (`models/patch_latents.py`):

    teacher        flow matching (`flow_matching.py`) on the latents of pictures, with prompts worded anew each time;
                   transformer and text encoder learn together
    autoencoder    the decoder alone, from latents to pictures: mean absolute and mean squared error

The first leaves a whole pipeline in `<folder>/pipeline`, the second `<folder>/vae`. The pipeline takes its decoder from
there if it has been trained by then; running the first once more, with no budget left, takes a newer one.

Latents and words belong to a pipeline: they are fitted to the data when it is made, kept in `<folder>/start`, and read
off its own autoencoder and tokenizer from then on, so later pictures and prompts change nothing about them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast

from diffusion_opt.datasets import CAPTIONED, CaptionedDataSet, CaptionedPictures
from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.models import load
from diffusion_opt.models.call_defaults import call_defaults
from diffusion_opt.models.patch_latents import PatchPCA, fit, packed, pixels, statistics, taken_from
from diffusion_opt.models.text_encoder import build_tokenizer
from diffusion_opt.models.text_to_image import (
    PromptCondition,
    TextToImageConfig,
    TextVelocity,
    build_text_to_image,
    prompt_condition,
)
from diffusion_opt.training import Role, TrainConfig, TrainResult, processes, train

PIPELINE, VAE = "pipeline", "vae"
FITTED = 4000  # pictures that components and statistics are computed from
WORDED = 20_000  # prompts that the tokenizer is learned from
CROP = 64  # pixels a side, of decoder training, until the last part of its budget


@dataclass(frozen=True, slots=True)
class World:
    """A text-to-image model that can be trained by name: its data, sizes and budgets."""

    config: TextToImageConfig
    pictures: int  # distinct training pictures
    teacher: TrainConfig
    autoencoder: TrainConfig


def world_named(name: str) -> tuple[CaptionedDataSet, World]:
    """The data set of this name, and the model for its size. Raises ValueError for a name that is no such data set."""
    found = {one.name: one for one in CAPTIONED}
    if name not in found:
        raise ValueError(f"no captioned pictures are called {name!r}; there are {', '.join(found) or 'none'}")
    return found[name], World(
        config=TextToImageConfig(image_size=found[name].image_size),
        pictures=24_000,
        teacher=TrainConfig(
            minutes=240, batch_size=32, learning_rate=1.2e-3, warmup_steps=100, decay_fraction=0.5, ema_decay=0.998
        ),
        autoencoder=TrainConfig(
            minutes=40, batch_size=8, learning_rate=1e-3, warmup_steps=50, decay_fraction=0.5, ema_decay=0.99
        ),
    )


@dataclass(frozen=True)
class LatentPictures:
    """Samples of a teacher: pictures as normalized packed latents (B, 4 K, h, w), with prompts as token numbers.

    Both are made when they are drawn. A linear encoder costs less than reading stored latents.
    """

    data: CaptionedPictures
    pca: PatchPCA
    norm: nn.BatchNorm2d  # the autoencoder's: mean and variance of packed latents
    tokenizer: Qwen2TokenizerFast
    length: int  # tokens of a prompt

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, num: int, generator: torch.Generator) -> tuple[Float[Tensor, "num c h w"], PromptCondition]:
        """A random batch, with repetition; pictures and words come from the generator."""
        indices = self.data.indices(num, generator)
        latents = packed(self.pca.encode(pixels(self.data.pictures[indices].to(generator.device))))
        prompts = [self.data.caption(index, generator) for index in indices]
        deviation = (self.norm.running_var + self.norm.eps).sqrt()
        normalized = (latents - self.norm.running_mean[:, None, None]) / deviation[:, None, None]
        return normalized, prompt_condition(self.tokenizer, prompts, self.length).to(generator.device)

    def fingerprint(self) -> str:
        return self.data.fingerprint()


@dataclass
class DecoderTraining:
    """A `Distiller` that fits a decoder to (latents, picture) of crops, and of whole pictures at the end.

    A group norm sees the whole of what it is given, so a decoder trained on crops alone meets other statistics later.
    """

    decoder: nn.Module
    data: CaptionedPictures
    pca: PatchPCA
    crop: int = CROP
    whole_from: float = 0.75  # share of the budget from which on pictures are not cut

    def __post_init__(self) -> None:
        self.share = 0.0

    @property
    def roles(self) -> dict[str, Role]:
        return {"decoder": Role(self.decoder)}

    def progress(self, share: float) -> None:
        self.share = share

    def turn(self, step: int) -> str:
        return "decoder"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "decoder") -> dict[str, Tensor]:
        """Mean absolute plus mean squared error; `psnr` is in dB, of values that are not clipped."""
        size, side = self.data.pictures.shape[-1], self.crop
        if self.share >= self.whole_from or side >= size:
            side = size
            batch_size = max(1, batch_size * self.crop**2 // size**2)  # as many pixels
        x = pixels(self.data.pictures[self.data.indices(batch_size, generator)].to(generator.device))
        places = size // 8 - side // 8 + 1
        row, column = (8 * torch.randint(places, (2,), generator=generator, device=generator.device)).tolist()
        x = x[:, :, row : row + side, column : column + side]
        error = self.decoder(self.pca.encode(x)) - x
        squared = error.square().mean()
        return {"loss": error.abs().mean() + squared, "psnr": 10 * torch.log10(4 / squared.detach())}


class Decoder(nn.Module):
    """The half of an autoencoder that makes pictures (B, 3, 8 h, 8 w) of latents (B, K, h, w)."""

    def __init__(self, vae: AutoencoderKLFlux2) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z: Float[Tensor, "b k h w"]) -> Float[Tensor, "b 3 i j"]:
        return self.decoder(self.post_quant_conv(z))


@dataclass(frozen=True)
class Begun:
    """A pipeline before its training, and what it is trained on."""

    world: World
    data: CaptionedPictures
    pipe: Flux2KleinPipeline
    pca: PatchPCA  # as its encoder computes


def begin(
    name: str, cache: Path, folder: Path, start: str | Path | None = None, seed: int = 0, device: str = "cpu"
) -> Begun:
    """The pipeline as its training starts: fresh, or another one at this model's shift of times.

    It is kept in `folder` for when the training is resumed.

    Pictures are drawn once and kept in `cache`. Raises ValueError for a start that is no pipeline of this kind.
    """
    data_set, world = world_named(name)
    data = data_set.pictures(world.pictures, 0, "train", cache)
    if not (folder / "model_index.json").is_file():
        if start is None:
            pca = fit(data.pictures[:FITTED], world.config.channels)
            tokenizer = build_tokenizer(data.prompts(WORDED), world.config.text.vocabulary)
            made = statistics(pca, data.pictures[:FITTED])
            pipe = build_text_to_image(world.config, pca, made, tokenizer, seed)
        else:
            pipe = load(start, dtype="float32")
            check_kind(pipe, str(start))
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=world.config.shift)
        with processes().main_first():
            if processes().is_main:
                pipe.save_pretrained(folder, safe_serialization=True)
    pipe = load(folder, dtype="float32")
    pca = taken_from(pipe.vae)
    return Begun(world, data, pipe.to(device), pca.to(device))


def make_text_to_image_teacher(
    begun: Begun, config: TrainConfig, out: Path, vae: Path | None = None, progress: bool = True
) -> tuple[Flux2KleinPipeline, TrainResult]:
    """Train transformer and text encoder (or resume), and save the pipeline to `out/pipeline`.

    `vae` is the folder of the autoencoder that the other training left, if it has. Raises ValueError for an
    autoencoder of other latents, and if `out` holds a run with other settings.
    """
    pipe, call = begun.pipe, call_defaults(begun.pipe)
    network = TextVelocity(pipe, call["text_encoder_out_layers"]).train().requires_grad_(True)
    samples = LatentPictures(begun.data, begun.pca, pipe.vae.bn, pipe.tokenizer, call["max_sequence_length"])
    with attention_for(config):
        result = train(FlowMatching(network, samples, shift=pipe.scheduler.config.shift), config, out, progress)
    pipe.transformer.load_state_dict(result.ema.transformer.state_dict())
    pipe.text_encoder.model.load_state_dict(result.ema.text_encoder.state_dict())
    pipe.transformer.eval(), pipe.text_encoder.eval()
    if vae is not None:
        pipe.register_modules(vae=trained_autoencoder(vae, pipe.vae))
    if processes().is_main:
        pipe.save_pretrained(out / PIPELINE, safe_serialization=True)
    return pipe, result


def make_autoencoder(
    begun: Begun, config: TrainConfig, out: Path, progress: bool = True
) -> tuple[AutoencoderKLFlux2, TrainResult]:
    """Train the decoder (or resume), and save the autoencoder to `out/vae`."""
    vae = begun.pipe.vae
    network = Decoder(vae).train().requires_grad_(True).to(memory_format=torch.channels_last)
    result = train(DecoderTraining(network, begun.data, begun.pca), config, out, progress)
    network.load_state_dict(result.ema.state_dict())
    if processes().is_main:
        vae.eval().save_pretrained(out / VAE, safe_serialization=True)
    return vae, result


@contextmanager
def attention_for(config: TrainConfig) -> Iterator[None]:
    """In bfloat16 on a CPU attention is computed by plain matrix products, which use its AMX units backward too.

    With torch's fused kernel the backward pass took a third of a step at 76 tokens.
    """
    if config.precision == "bfloat16" and not torch.cuda.is_available():
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def trained_autoencoder(folder: Path, like: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    """A trained autoencoder in place of this one; its decoder may be of another size.

    Raises ValueError if its latents, or their statistics, are not those of this one.
    """
    trained = AutoencoderKLFlux2.from_pretrained(folder, use_safetensors=True).eval()
    if trained.config.latent_channels != like.config.latent_channels:
        raise ValueError(
            f"the autoencoder in {folder} has {trained.config.latent_channels} channels, "
            f"this model {like.config.latent_channels}: train it for this model"
        )
    mine, other = taken_from(like), taken_from(trained)
    pairs = {
        "directions": (mine.directions / mine.scale, other.directions / other.scale),
        "mean": (like.bn.running_mean, trained.bn.running_mean),
        "variance": (like.bn.running_var, trained.bn.running_var),
    }
    for name, (one, two) in pairs.items():
        if not torch.allclose(one, two, atol=1e-3, rtol=1e-3):
            raise ValueError(f"the autoencoder in {folder} has other latents ({name} differ): train it for this model")
    return trained


def check_kind(pipe: object, name: str) -> None:
    """Raises ValueError unless this is a pipeline that `build_text_to_image` could have built."""
    if not isinstance(pipe, Flux2KleinPipeline) or not isinstance(getattr(pipe, "vae", None), AutoencoderKLFlux2):
        raise ValueError(f"{name} is no FLUX.2 with an autoencoder and a text encoder: start from one that is")
    missing = {"text_encoder_out_layers", "max_sequence_length"} - call_defaults(pipe).keys()
    if missing:
        raise ValueError(f"{name} does not say how it is called ({', '.join(sorted(missing))} of call.json)")
