"""Tiny full pipelines: every diffusers pipeline class that the package speaks of, with random weights, in memory.

Each has the real scheduler, transformer, autoencoder, text encoder and tokenizer classes with small numbers in their
configs, and is called by text as a user calls it. Nothing is downloaded and nothing is stubbed, so what fails here
fails for the user. A pipeline comes with a small `Run`, the call that suits it:

    pipe, run = tiny_pipeline("wan"), tiny_run("wan", num_inference_steps=4)
    latents = run.generate(pipe, [0])

`python -m tiny_pipelines NAME FOLDER` (with tests/ on the path) saves one as a folder, for trying commands on it.
`small_transformers` and `small_pipelines` are smaller still: single transformers, and pipelines without text encoders.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusion_opt.subjects import Run
from tiny_pipelines import images, videos
from tiny_pipelines.pictures import corner, picture

PROMPTS = ("a photo of a cat", "two dogs in the rain")
NEGATIVE = "blurry"


@dataclass(frozen=True, slots=True)
class Tiny:
    """How a pipeline is built and called."""

    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]  # fields of `Run` beside prompts; those in `arguments` are further arguments of the call


def _picture(side: int, guidance: float | None, length: int = 32, batch: int = 2, **arguments: Any) -> dict[str, Any]:
    """The call of a pipeline that makes pictures; one that is given a picture takes one prompt at a time."""
    return {
        "height": side, "width": side, "guidance_scale": guidance, "batch_size": batch,
        "arguments": {"max_sequence_length": length} | arguments,
    }  # fmt: skip


def _clip(side: int, frames: int, guidance: float | None, **arguments: Any) -> dict[str, Any]:
    """The call of a pipeline that makes clips, with the second pass that a negative prompt asks for."""
    return {
        "height": side, "width": side, "num_frames": frames, "guidance_scale": guidance, "negative_prompt": NEGATIVE,
        "arguments": {"max_sequence_length": 32} | arguments,
    }  # fmt: skip


_LTX2 = {"frame_rate": 25.0}
_PAINT = {"image": picture(64), "mask_image": corner(64), "strength": 0.8}
_REPAINT = {"image": picture(32), "mask_image": corner(32), "strength": 0.8}
_ASKED = {"use_resolution_binning": False, "clean_caption": False}
_HUNYUAN = {"max_sequence_length": 32, "prompt_template": {"template": "{}", "crop_start": 0}}

TINY: dict[str, Tiny] = {
    "flux2-klein": Tiny(images.flux2_klein, _picture(64, 4.0)),
    "flux2-klein-distilled": Tiny(partial(images.flux2_klein, is_distilled=True), _picture(64, 1.0)),
    "flux2-klein-reference": Tiny(images.flux2_klein, _picture(64, 4.0, batch=1, image=[picture(64, 1)])),
    "flux2-klein-inpaint": Tiny(
        partial(images.flux2_klein, diffusers.Flux2KleinInpaintPipeline), _picture(64, 4.0, batch=1, **_PAINT)
    ),
    "flux2-klein-kv": Tiny(
        partial(images.flux2_klein, diffusers.Flux2KleinKVPipeline),
        _picture(64, None, batch=1, image=[picture(64, 1)]),
    ),
    "flux2-dev": Tiny(images.flux2_dev, _picture(64, 4.0)),
    "sd3": Tiny(images.sd3, _picture(32, 5.0)),
    "sd3.5-medium": Tiny(
        partial(images.sd3, dual_layers=(0, 1)),
        _picture(32, 5.0, skip_guidance_layers=[1], skip_layer_guidance_scale=2.0),
    ),
    "sd3-img2img": Tiny(
        partial(images.sd3, diffusers.StableDiffusion3Img2ImgPipeline),
        {"guidance_scale": 5.0, "arguments": {"max_sequence_length": 32, "image": picture(32), "strength": 0.8}},
    ),
    "sd3-inpaint": Tiny(
        partial(images.sd3, diffusers.StableDiffusion3InpaintPipeline, 16), _picture(32, 5.0, batch=1, **_REPAINT)
    ),
    "flux": Tiny(images.flux, _picture(32, 3.5)),
    "flux-img2img": Tiny(
        partial(images.flux, diffusers.FluxImg2ImgPipeline),
        _picture(32, 3.5, batch=1, image=picture(32), strength=0.8),
    ),
    "qwen-image": Tiny(
        images.qwen_image,  # its template has 240 bytes, of which the pipeline drops 34
        _picture(32, None, length=256, true_cfg_scale=4.0) | {"negative_prompt": NEGATIVE},
    ),
    "z-image": Tiny(images.z_image, _picture(32, 3.0) | {"negative_prompt": NEGATIVE}),
    "pixart": Tiny(images.pixart, _picture(32, 4.5, **_ASKED)),
    "sana": Tiny(images.sana, _picture(32, 4.5, **_ASKED, complex_human_instruction=None)),
    "sdxl": Tiny(images.sdxl, {"height": 64, "width": 64, "guidance_scale": 5.0, "batch_size": 2}),
    "wan": Tiny(videos.wan, _clip(32, 9, 5.0)),
    "wan-i2v": Tiny(videos.wan_i2v, _clip(32, 9, 5.0, image=picture(32))),
    "wan2.2": Tiny(videos.wan22, _clip(32, 9, 5.0)),
    "wan2.2-5b": Tiny(videos.wan22_5b, _clip(64, 9, 5.0)),
    "wan-vace": Tiny(videos.wan_vace, _clip(32, 9, 5.0)),
    "ltx": Tiny(videos.ltx, _clip(32, 9, 3.0)),
    "ltx-i2v": Tiny(partial(videos.ltx, diffusers.LTXImageToVideoPipeline), _clip(32, 9, 3.0, image=picture(32))),
    "ltx2": Tiny(videos.ltx2, _clip(32, 5, 4.0, spatio_temporal_guidance_blocks=[2], **_LTX2)),
    "ltx2-cfg": Tiny(
        videos.ltx2,
        _clip(32, 5, 4.0, stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0, **_LTX2),
    ),
    "ltx2-i2v": Tiny(
        partial(videos.ltx2, diffusers.LTX2ImageToVideoPipeline),
        _clip(32, 5, 4.0, spatio_temporal_guidance_blocks=[2], image=picture(32), image_crf=0, **_LTX2),
    ),
    "hunyuan-video": Tiny(videos.hunyuan_video, _clip(32, 9, 4.5, **_HUNYUAN) | {"negative_prompt": None}),
    "hunyuan-video-1.5": Tiny(videos.hunyuan_video15, {"height": 32, "width": 32, "num_frames": 5}),
    "cogvideox": Tiny(videos.cogvideox, _clip(32, 9, 6.0)),
}


def tiny_pipeline(name: str) -> DiffusionPipeline:
    """A fresh pipeline; the same weights at each call, and the global generator as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = TINY[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_run(name: str, num_inference_steps: int = 6, **changes: Any) -> Run:
    """The call that suits a pipeline; `changes` go to the fields of `Run`."""
    run = Run(PROMPTS, num_inference_steps=num_inference_steps, **TINY[name].call)
    return replace(run, **changes)


__all__ = ["PROMPTS", "TINY", "Tiny", "tiny_pipeline", "tiny_run"]
