"""Tokenizers and text encoders of the real classes, without a download and without training.

A byte-level vocabulary needs no merges: each of the 256 bytes is a token, special tokens follow. The encoders are
stock transformers classes with widths of 16 or 32 and random weights, so prompts of different letters give different
embeddings, which is all that the pipelines need of them.
"""

import string

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = 512  # tokens that the encoders know: bytes and special tokens lie below
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_CHAT = (  # without FLUX.2's long system message, whose bytes would leave no room for a prompt
    "{% for m in messages if m['role'] != 'system' %}[INST]"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}[/INST]{% endfor %}"
)


def _vocabulary(*special: str, letters: list[str] = BYTES) -> dict[str, int]:
    return {token: index for index, token in enumerate((*special, *letters))}


def qwen_tokenizer() -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.Qwen2Tokenizer(vocab=_vocabulary("<|endoftext|>"), merges=[], model_max_length=1024)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *vision]})
    tokenizer.chat_template = CHAT
    return tokenizer


def clip_tokenizer() -> transformers.PreTrainedTokenizerBase:
    letters = [*BYTES, *(letter + "</w>" for letter in BYTES)]
    vocabulary = _vocabulary("<|startoftext|>", "<|endoftext|>", letters=letters)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.PreTrainedTokenizerBase:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [(letter, -5.0) for letter in "▁" + string.ascii_letters + string.digits + ".,-"]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> transformers.PreTrainedTokenizerBase:
    letters = list("▁\n" + string.printable[:95])
    vocabulary = _vocabulary("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", letters=letters)
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=1024)
    tokenizer.chat_template = CHAT
    return tokenizer


def mistral_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """FLUX.2 [dev] and HunyuanVideo store theirs in the general class, with a template for chats."""
    special = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    whole = Tokenizer(models.BPE(vocab=_vocabulary(*special), merges=[], unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=1024,
    )  # fmt: skip
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def _decoder(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 1100,
    }  # fmt: skip


def t5_encoder(width: int = 32) -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def clip_encoder(width: int = 32, projection: bool = True) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=2 * VOCABULARY, hidden_size=width, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3,
        projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def clip_vision_encoder() -> torch.nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        intermediate_size=16, patch_size=16,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config).eval()


def qwen3_encoder(layers: int, causal: bool = True) -> torch.nn.Module:
    """FLUX.2 [klein] reads the layers 9, 18 and 27."""
    config = transformers.Qwen3Config(**_decoder(16, layers), head_dim=8)
    return (transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model)(config).eval()


def _rotary() -> dict[str, object]:
    rotary = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    return rotary | {"rope_theta": 1e6, "bos_token_id": 0, "eos_token_id": 0}


def qwen_vl_encoder() -> torch.nn.Module:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=_decoder(16, 2) | _rotary(), vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_vl_text_encoder() -> torch.nn.Module:
    config = transformers.Qwen2_5_VLTextConfig(**_decoder(16, 3), **_rotary())
    return transformers.Qwen2_5_VLTextModel(config).eval()


def mistral3_encoder() -> torch.nn.Module:
    """FLUX.2 [dev] reads the layers 10, 20 and 30."""
    text = _decoder(16, 30) | {"model_type": "mistral", "head_dim": 8, "sliding_window": None}
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 32, "patch_size": 16, "num_channels": 3,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, vision_feature_layer=-1, image_token_index=6
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def gemma2_encoder() -> torch.nn.Module:
    config = transformers.Gemma2Config(**_decoder(16, 1), head_dim=8, attn_implementation="eager")
    return transformers.Gemma2Model(config).eval()


def gemma3_encoder() -> torch.nn.Module:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=_decoder(32, 2) | {"head_dim": 16}, vision_config=vision)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def llama_encoder() -> torch.nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**_decoder(16, 3))).eval()
