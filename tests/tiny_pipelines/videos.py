"""Pipelines that make clips: Wan, LTX-Video, LTX-2, HunyuanVideo and CogVideoX."""

import diffusers
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from torch import nn

from tiny_pipelines import autoencoders, networks, texts


def _wan_parts(transformer: nn.Module) -> dict[str, object]:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {
        "transformer": transformer, "vae": autoencoders.wan(), "scheduler": scheduler,
        "text_encoder": texts.t5_encoder(), "tokenizer": texts.t5_tokenizer(),
    }  # fmt: skip


def wan() -> DiffusionPipeline:
    return diffusers.WanPipeline(**_wan_parts(networks.wan()))


def wan22() -> DiffusionPipeline:
    """Two transformers: the first makes the steps above 87.5 % of the training times."""
    return diffusers.WanPipeline(**_wan_parts(networks.wan()), transformer_2=networks.wan(), boundary_ratio=0.875)


def wan22_5b() -> DiffusionPipeline:
    """One transformer, and a time for each token."""
    parts = _wan_parts(networks.wan(48, 48)) | {"vae": autoencoders.wan22()}
    return diffusers.WanPipeline(**parts, boundary_ratio=None, expand_timesteps=True)


def wan_i2v() -> DiffusionPipeline:
    return diffusers.WanImageToVideoPipeline(
        **_wan_parts(networks.wan(36, 16, image_dim=4)), image_encoder=texts.clip_vision_encoder(),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip


def wan_vace() -> DiffusionPipeline:
    return diffusers.WanVACEPipeline(**_wan_parts(networks.wan_vace()))


def ltx(kind: type[DiffusionPipeline] = diffusers.LTXPipeline) -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return kind(
        transformer=networks.ltx(), vae=autoencoders.ltx(), scheduler=scheduler, text_encoder=texts.t5_encoder(),
        tokenizer=texts.t5_tokenizer(),
    )  # fmt: skip


def _connectors() -> nn.Module:
    size = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    streams = {f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in size.items()}
    return LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=3, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False, rope_type="split", **streams,
    ).eval()  # fmt: skip


def _vocoder(audio: nn.Module) -> nn.Module:
    return LTX2Vocoder(
        in_channels=audio.config.output_channels * audio.config.mel_bins, hidden_channels=32, out_channels=2,
        upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    ).eval()  # fmt: skip


def ltx2(kind: type[DiffusionPipeline] = diffusers.LTX2Pipeline) -> DiffusionPipeline:
    audio = autoencoders.ltx2_audio()
    return kind(
        transformer=networks.ltx2(), vae=autoencoders.ltx2_video(), audio_vae=audio, vocoder=_vocoder(audio),
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=texts.gemma3_encoder(),
        tokenizer=texts.gemma_tokenizer(), connectors=_connectors(),
    )  # fmt: skip


def hunyuan_video() -> DiffusionPipeline:
    return diffusers.HunyuanVideoPipeline(
        transformer=networks.hunyuan_video(), vae=autoencoders.hunyuan_video(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder=texts.llama_encoder(),
        tokenizer=texts.mistral_tokenizer(), text_encoder_2=texts.clip_encoder(8, projection=False),
        tokenizer_2=texts.clip_tokenizer(),
    )  # fmt: skip


def hunyuan_video15() -> DiffusionPipeline:
    """Its guidance is set at the guider and not in the call, and the lengths of its texts at the pipeline."""
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=networks.hunyuan_video15(), vae=autoencoders.hunyuan_video15(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder=texts.qwen_vl_text_encoder(),
        tokenizer=texts.qwen_tokenizer(), text_encoder_2=texts.t5_encoder(), tokenizer_2=transformers.ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    pipe.system_message, pipe.prompt_template_encode_start_idx = "", 0
    pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 64
    pipe.vision_num_semantic_tokens = 8
    return pipe


def cogvideox() -> DiffusionPipeline:
    return diffusers.CogVideoXPipeline(
        transformer=networks.cogvideox(), vae=autoencoders.cogvideox(), scheduler=diffusers.CogVideoXDDIMScheduler(),
        text_encoder=texts.t5_encoder(), tokenizer=texts.t5_tokenizer(),
    )  # fmt: skip
