"""Real samples of a user: latents in a file, or a folder of pictures with captions.

    latents     safetensors with "latents" (N, …), as the pipeline's scheduler sees them (of the shape
                `PromptedPipeline.sample_shape`), and "prompts" (N,), the numbers of their prompts in the run
    pictures    `cat.png` with its caption in `cat.txt` beside it; the captions are the prompts of the run

Pictures are encoded once, by the pipeline's own autoencoder, at the size of the run: scaled until they cover it, then
cut in the middle. FLUX.2 and SD3 are served; clips, and other families, come as latents.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline, StableDiffusion3Pipeline
from jaxtyping import Float
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_opt.datasets import CorruptFileError, ImageData

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def latents_of(path: Path, prompts: tuple[str, ...]) -> ImageData:
    """The samples of a file of latents.

    Raises CorruptFileError for a file that cannot be read, ValueError for one that lacks either tensor or names a
    prompt that the run has not.
    """
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors ({error})") from error
    if missing := {"latents", "prompts"} - stored.keys():
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}; it holds {', '.join(sorted(stored))}")
    return ImageData(stored["latents"].float(), stored["prompts"].long(), prompts)


def captioned(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The pictures of a folder, in order, and the caption of each.

    Raises ValueError for a folder without pictures, and for a picture without a caption.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    if bare := [path for path in paths if not path.with_suffix(".txt").is_file()]:
        raise ValueError(f"{bare[0]} has no caption: write one to {bare[0].with_suffix('.txt').name} beside it")
    return paths, tuple(path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths)


@torch.no_grad()
def encoded(
    pipe: DiffusionPipeline, paths: list[Path], captions: tuple[str, ...], height: int, width: int
) -> tuple[ImageData, tuple[str, ...]]:
    """The pictures as latents of a size in pixels, and the prompts: the captions without repetition.

    Raises ValueError for a pipeline whose autoencoder is not known here.
    """
    prompts = tuple(dict.fromkeys(captions))
    latents = [_latents(pipe, _picture(path, height, width)) for path in paths]
    labels = torch.tensor([prompts.index(caption) for caption in captions])
    return ImageData(torch.cat(latents).float().cpu(), labels, prompts), prompts


def _picture(path: Path, height: int, width: int) -> Float[Tensor, "1 3 h w"]:
    """A picture in [-1, 1], scaled and cut to the size."""
    with Image.open(path) as opened:
        fitted = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.view(1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _latents(pipe: DiffusionPipeline, picture: Float[Tensor, "1 3 h w"]) -> Tensor:
    """The latents of a picture as the pipeline's scheduler sees them."""
    x = picture.to(pipe.vae.device, pipe.vae.dtype)
    if isinstance(pipe, Flux2KleinPipeline | Flux2Pipeline):
        return pipe._pack_latents(pipe._encode_vae_image(x, generator=torch.Generator(x.device).manual_seed(0)))
    if isinstance(pipe, StableDiffusion3Pipeline):
        config = pipe.vae.config
        return (pipe.vae.encode(x).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor
    raise ValueError(f"pictures cannot be encoded for {type(pipe).__name__} here: give latents")
