"""The layer policy, by name: what of FLUX.2 is quantized and what is not."""

import re

import pytest
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from diffusion_opt.quantization import choose, policy_for

QUANTIZED = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.attn.to_add_out",
    "transformer_blocks.0.ff.linear_in",
    "transformer_blocks.0.ff.linear_out",
    "transformer_blocks.0.ff_context.linear_in",
    "transformer_blocks.0.ff_context.linear_out",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.0.attn.to_out",
    "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.1.attn.to_out",
]
KEPT = [
    "time_guidance_embed.timestep_embedder.linear_1",
    "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.linear",
    "single_stream_modulation.linear",
    "x_embedder",
    "context_embedder",
    "norm_out.linear",
    "proj_out",
]


def test_flux2_by_name(pipe):
    choices = {choice.name: choice for choice in choose(pipe.transformer)}
    assert sorted(name for name, choice in choices.items() if choice.quantized) == sorted(QUANTIZED)
    assert sorted(name for name, choice in choices.items() if not choice.quantized) == sorted(KEPT)
    assert "modulation" in choices["single_stream_modulation.linear"].reason
    assert all(pipe.transformer.get_submodule(name) is choice.layer for name, choice in choices.items())


def test_every_pattern_of_the_policy_is_needed(pipe):
    linears = [name for name, module in pipe.transformer.named_modules() if isinstance(module, nn.Linear)]
    for kept in policy_for(pipe.transformer).kept:
        assert any(re.fullmatch(kept.pattern, name) for name in linears), kept.pattern
        assert kept.reason


def test_skip_and_width_keep_more_with_their_reason(pipe):
    choices = {c.name: c.reason for c in choose(pipe.transformer, min_width=33, skip=(r".*\.ff_context\..*",))}
    assert choices["transformer_blocks.0.attn.to_q"] == "too narrow: 32 < 33"
    assert choices["transformer_blocks.0.ff_context.linear_in"] == r"skipped by '.*\\.ff_context\\..*'"


def test_what_cannot_be_chosen_says_why(pipe):
    with pytest.raises(ValueError, match=r"no quantization policy for Linear yet; there is one for Flux2Transf"):
        choose(nn.Linear(2, 2))
    wan = WanTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8)
    with pytest.raises(ValueError, match="WanTransformer3DModel"):
        policy_for(wan)
    with pytest.raises(ValueError, match="'ff' matches no linear layer; their names are like"):
        choose(pipe.transformer, skip=("ff",))
    with pytest.raises(ValueError, match="not a regular expression"):
        choose(pipe.transformer, skip=("(",))


def test_lora_must_be_fused_first(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"lora_A\S* is a LoRA layer: fuse it"):
        choose(pipe.transformer)
