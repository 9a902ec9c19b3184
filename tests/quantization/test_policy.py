"""The layer policy, by name: what of each family is quantized and what is not."""

import re

import pytest
from diffusers import AllegroTransformer3DModel
from peft import LoraConfig
from small_transformers import small_transformer
from tiny_pipelines import tiny_pipeline
from torch import nn

from diffusion_opt.models.block_stack import block_stack
from diffusion_opt.quantization import choose, policy_for
from diffusion_opt.quantization.families import repeated_blocks

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


def attention(block: str, *more: str) -> list[str]:
    return [f"{block}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", *more)]


def two(block: str, *names: str) -> list[str]:
    return [f"{block}.{name}" for name in names]


def embedder(name: str) -> list[str]:
    return two(name, "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")


FEED_FORWARD = ("net.0.proj", "net.2")
BY_FAMILY = {
    "ltx2": (
        [
            name
            for block in ("transformer_blocks.0", "transformer_blocks.1")
            for name in (
                *attention(f"{block}.attn1"), *attention(f"{block}.attn2"), *attention(f"{block}.audio_attn1"),
                *attention(f"{block}.audio_attn2"), *attention(f"{block}.audio_to_video_attn"),
                *attention(f"{block}.video_to_audio_attn"), *two(f"{block}.ff", *FEED_FORWARD),
                *two(f"{block}.audio_ff", *FEED_FORWARD),
            )
        ],
        [
            "proj_in", "audio_proj_in", "proj_out", "audio_proj_out",
            *two("caption_projection", "linear_1", "linear_2"),
            *two("audio_caption_projection", "linear_1", "linear_2"),
            *embedder("time_embed"), *embedder("audio_time_embed"), *embedder("av_cross_attn_video_scale_shift"),
            *embedder("av_cross_attn_audio_scale_shift"), *embedder("av_cross_attn_video_a2v_gate"),
            *embedder("av_cross_attn_audio_v2a_gate"),
        ],
    ),
    "ltx": (
        [
            name
            for block in ("transformer_blocks.0", "transformer_blocks.1")
            for name in (*attention(f"{block}.attn1"), *attention(f"{block}.attn2"), *two(f"{block}.ff", *FEED_FORWARD))
        ],
        ["proj_in", "proj_out", *two("caption_projection", "linear_1", "linear_2"), *embedder("time_embed")],
    ),
    "wan": (
        [
            name
            for block in ("blocks.0", "blocks.1")
            for name in (
                *attention(f"{block}.attn1"), *attention(f"{block}.attn2"), *two(f"{block}.ffn", *FEED_FORWARD),
            )
        ],
        [
            "proj_out", "condition_embedder.time_proj",
            *two("condition_embedder.time_embedder", "linear_1", "linear_2"),
            *two("condition_embedder.text_embedder", "linear_1", "linear_2"),
        ],
    ),
    "sd3": (
        [
            *attention("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *attention("transformer_blocks.0.attn2"),
            *two("transformer_blocks.0.ff", *FEED_FORWARD), *two("transformer_blocks.0.ff_context", *FEED_FORWARD),
            *attention("transformer_blocks.1.attn", "add_q_proj", "add_k_proj", "add_v_proj"),  # text ends
            *two("transformer_blocks.1.ff", *FEED_FORWARD),
        ],
        [
            "context_embedder", "norm_out.linear", "proj_out",
            *two("time_text_embed.timestep_embedder", "linear_1", "linear_2"),
            *two("time_text_embed.text_embedder", "linear_1", "linear_2"),
            *two("transformer_blocks.0", "norm1.linear", "norm1_context.linear"),
            *two("transformer_blocks.1", "norm1.linear", "norm1_context.linear"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", BY_FAMILY)
def test_other_families_by_name(family):
    choices = choose(small_transformer(family, blocks=2))
    quantized, kept = BY_FAMILY[family]
    assert sorted(choice.name for choice in choices if choice.quantized) == sorted(quantized)
    assert sorted(choice.name for choice in choices if not choice.quantized) == sorted(kept)


@pytest.mark.parametrize("family", ["flux2", *BY_FAMILY])
def test_blocks_at_the_ends_are_kept_whatever_the_depth(family):
    transformer = small_transformer(family)  # 4 blocks
    every = {choice.name for choice in choose(transformer) if choice.quantized}
    inner = {choice.name: choice for choice in choose(transformer, first_blocks=1, last_blocks=2)}
    prefix = {"wan": "blocks.1."}.get(family, "transformer_blocks.1.")
    assert {name for name, choice in inner.items() if choice.quantized} == {n for n in every if n.startswith(prefix)}
    reasons = {choice.reason for name, choice in inner.items() if name in every and not choice.quantized}
    assert reasons == {"in one of the first blocks", "in one of the last blocks"}
    with pytest.raises(
        ValueError, match="first_blocks=2 and last_blocks=2 must be 0 or more and leave one of 4 blocks"
    ):
        choose(transformer, first_blocks=2, last_blocks=2)


@pytest.mark.parametrize("family", ["flux2", *BY_FAMILY])
def test_every_pattern_of_the_policy_is_needed(family):
    transformer = small_transformer(family, blocks=2)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for kept in policy_for(transformer).kept:
        assert any(re.fullmatch(kept.pattern, name) for name in linears), kept.pattern
        assert kept.reason


@pytest.mark.parametrize(
    ("name", "kept_inside"),
    [
        ("flux", ("norm1.linear", "norm1_context.linear", "norm.linear")),
        ("qwen-image", ("img_mod.1", "txt_mod.1")),
        ("z-image", ("adaLN_modulation.0",)),
        ("pixart", ()),
        ("sana", ()),
        ("hunyuan-video", ("norm1.linear", "norm1_context.linear", "norm.linear")),
        ("hunyuan-video-1.5", ("norm1.linear", "norm1_context.linear")),
        ("cogvideox", ("norm1.linear", "norm2.linear")),
        ("wan-vace", ("proj_in", "proj_out")),
    ],
)
def test_other_families_have_policies_too(name, kept_inside):
    transformer = tiny_pipeline(name).transformer
    choices = {choice.name: choice for choice in choose(transformer)}
    blocks = tuple(f"{block}." for block in repeated_blocks(transformer))
    assert all(n.startswith(blocks) for n, choice in choices.items() if choice.quantized)
    kept = {n for n, choice in choices.items() if not choice.quantized and n.startswith(blocks)}
    assert {n.split(".", 2)[2] for n in kept} == set(kept_inside)
    for pattern in (kept.pattern for kept in policy_for(transformer).kept):
        assert any(re.fullmatch(pattern, n) for n in choices) or "ofs" in pattern or "_refiner" in pattern, pattern


def test_blocks_of_the_policy_are_those_of_the_step_caches():
    for family in ("flux2", *BY_FAMILY):
        transformer = small_transformer(family, blocks=4)
        assert tuple(repeated_blocks(transformer).values()) == tuple(block_stack(transformer).blocks)


def test_an_unknown_family_gets_a_general_policy_that_says_so():
    allegro = AllegroTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, caption_channels=16,
        cross_attention_dim=24, sample_height=8, sample_width=8, sample_frames=4,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="AllegroTransformer3DModel has no quantization policy of its own: a general"):
        choices = choose(allegro, last_blocks=1)
    quantized = {choice.name for choice in choices if choice.quantized}
    assert quantized and all(name.startswith("transformer_blocks.0.") for name in quantized)
    assert not any("norm" in name or "embed" in name for name in quantized)
    reasons = {choice.name: choice.reason for choice in choices}
    assert reasons["proj_out"] == "outside the repeated blocks (general policy)"
    assert policy_is_general(allegro)


def policy_is_general(transformer: nn.Module) -> bool:
    with pytest.warns(UserWarning):
        return policy_for(transformer).general


def test_skip_and_width_keep_more_with_their_reason(pipe):
    choices = {c.name: c.reason for c in choose(pipe.transformer, min_width=33, skip=(r".*\.ff_context\..*",))}
    assert choices["transformer_blocks.0.attn.to_q"] == "too narrow: 32 < 33"
    assert choices["transformer_blocks.0.ff_context.linear_in"] == r"skipped by '.*\\.ff_context\\..*'"


def test_what_cannot_be_chosen_says_why(pipe):
    with pytest.raises(ValueError, match=r"Linear has no quantization policy and no list of blocks .*Flux2Transf"):
        choose(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'ff' matches no linear layer; their names are like"):
        choose(pipe.transformer, skip=("ff",))
    with pytest.raises(ValueError, match="not a regular expression"):
        choose(pipe.transformer, skip=("(",))


def test_lora_must_be_fused_first(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"lora_A\S* is a LoRA layer: fuse it"):
        choose(pipe.transformer)
