"""Pipelines that make pictures: FLUX.2, FLUX.1, Stable Diffusion 3, Qwen-Image, Z-Image, PixArt, Sana and SDXL."""

import diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tiny_pipelines import autoencoders, networks, texts


def _flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Shifts its times by the size of the picture."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)


def flux2_klein(kind: type[DiffusionPipeline] = diffusers.Flux2KleinPipeline, **settings: object) -> DiffusionPipeline:
    """Also its inpainting and KV variants; `is_distilled=True` goes without guidance."""
    return kind(
        scheduler=_flux_scheduler(), vae=autoencoders.flux2(), text_encoder=texts.qwen3_encoder(28),
        tokenizer=texts.qwen_tokenizer(), transformer=networks.flux2(), **settings,
    )  # fmt: skip


def flux2_dev() -> DiffusionPipeline:
    return diffusers.Flux2Pipeline(
        scheduler=_flux_scheduler(), vae=autoencoders.flux2(), text_encoder=texts.mistral3_encoder(),
        tokenizer=texts.mistral_tokenizer(), transformer=networks.flux2(guidance=True),
    )  # fmt: skip


def sd3(
    kind: type[DiffusionPipeline] = diffusers.StableDiffusion3Pipeline,
    channels: int = 4,
    dual_layers: tuple[int, ...] = (),
) -> DiffusionPipeline:
    """SD 3.5 medium has layers of dual attention; inpainting wants 16 latent channels."""
    return kind(
        transformer=networks.sd3(channels, dual_layers), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoders.kl(channels), text_encoder=texts.clip_encoder(), tokenizer=texts.clip_tokenizer(),
        text_encoder_2=texts.clip_encoder(), tokenizer_2=texts.clip_tokenizer(), text_encoder_3=texts.t5_encoder(),
        tokenizer_3=texts.t5_tokenizer(),
    )  # fmt: skip


def flux(kind: type[DiffusionPipeline] = diffusers.FluxPipeline) -> DiffusionPipeline:
    return kind(
        transformer=networks.flux(), scheduler=_flux_scheduler(), vae=autoencoders.kl(),
        text_encoder=texts.clip_encoder(projection=False), tokenizer=texts.clip_tokenizer(),
        text_encoder_2=texts.t5_encoder(), tokenizer_2=texts.t5_tokenizer(),
    )  # fmt: skip


def qwen_image() -> DiffusionPipeline:
    return diffusers.QwenImagePipeline(
        transformer=networks.qwen_image(), vae=autoencoders.qwen_image(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.qwen_vl_encoder(), tokenizer=texts.qwen_tokenizer(),
    )  # fmt: skip


def z_image() -> DiffusionPipeline:
    return diffusers.ZImagePipeline(
        transformer=networks.z_image(), vae=autoencoders.kl(16, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=texts.qwen3_encoder(2, causal=False),
        tokenizer=texts.qwen_tokenizer(),
    )  # fmt: skip


def pixart() -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        transformer=networks.pixart(), vae=autoencoders.kl(), scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=texts.t5_encoder(), tokenizer=texts.t5_tokenizer(),
    )  # fmt: skip


def sana() -> DiffusionPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        transformer=networks.sana(), vae=autoencoders.sana(), scheduler=scheduler,
        text_encoder=texts.gemma2_encoder(), tokenizer=texts.gemma_tokenizer(),
    )  # fmt: skip


def sdxl() -> DiffusionPipeline:
    """Denoises with a UNet, which no technique of the package serves."""
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=networks.sdxl_unet(), vae=autoencoders.kl(), scheduler=scheduler,
        text_encoder=texts.clip_encoder(projection=False), tokenizer=texts.clip_tokenizer(),
        text_encoder_2=texts.clip_encoder(), tokenizer_2=texts.clip_tokenizer(),
    )  # fmt: skip
