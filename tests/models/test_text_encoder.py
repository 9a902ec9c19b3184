"""The tokenizer of a data set's own words and the small encoder, against what the stock pipeline does with them."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from transformers import Qwen2TokenizerFast

from diffusion_opt.models.text_encoder import (
    TextEncoderConfig,
    build_text_encoder,
    build_tokenizer,
    encoded,
    token_ids,
    words,
)

PROMPTS = ("a toon face with side shaved hair, brown skin on mint", "an 8 bit avatar, a red outfit", "brown hair")
CONFIG = TextEncoderConfig(width=24, layers=2, heads=3, out_layers=(0, 2), max_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2TokenizerFast:
    return build_tokenizer(PROMPTS * 3, 600)


def test_a_known_word_is_one_token_wherever_it_stands(tokenizer: Qwen2TokenizerFast) -> None:
    ids, mask = token_ids(tokenizer, ["brown skin", "Skin, BROWN", "a brown and the skin"], 12)
    assert mask.sum(1).tolist() == [3, 3, 3]
    assert ids[0, :2].tolist() == ids[1, :2].flip(0).tolist() == ids[2, :2].tolist()


def test_template_and_words_leave_out_the_same(tokenizer: Qwen2TokenizerFast) -> None:
    for prompt in (*PROMPTS, "A Face,with  red hair", ""):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
        assert text.removesuffix("<|im_end|>").split() == words(prompt)


def test_the_empty_prompt_is_one_token_and_unknown_words_fall_into_pieces(tokenizer: Qwen2TokenizerFast) -> None:
    _, mask = token_ids(tokenizer, ["", "zebra", "toon"], 12)
    assert mask.sum(1).tolist()[0] == 1
    assert mask.sum(1).tolist()[1] > mask.sum(1).tolist()[2] == 2


def test_tokenizer_round_trip(tokenizer: Qwen2TokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = Qwen2TokenizerFast.from_pretrained(tmp_path)
    for prompt in (*PROMPTS, "zebra in Blue", ""):
        assert torch.equal(token_ids(tokenizer, [prompt], 30)[0], token_ids(again, [prompt], 30)[0])
    assert tokenizer.decode(token_ids(tokenizer, [PROMPTS[2]], 5)[0][0, :2]) == " brown hair"


def test_encoding_equals_the_stock_pipeline(tokenizer: Qwen2TokenizerFast) -> None:
    encoder = build_text_encoder(tokenizer, CONFIG)
    prompts = [*PROMPTS, ""]
    ids, mask = token_ids(tokenizer, prompts, CONFIG.max_tokens)
    with torch.no_grad():
        mine = encoded(encoder.model, ids, mask, CONFIG.out_layers)
        stock = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            encoder, tokenizer, prompts, max_sequence_length=12, hidden_states_layers=list(CONFIG.out_layers)
        )
    assert mine.shape == (4, 12, CONFIG.text_width)
    assert torch.equal(mine, stock)
    assert not torch.allclose(mine[0, 0], mine[1, 0])


def test_fresh_weights_depend_on_the_seed_alone(tokenizer: Qwen2TokenizerFast) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (build_text_encoder(tokenizer, CONFIG, seed).model.embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_cannot_be_read_is_refused(tokenizer: Qwen2TokenizerFast) -> None:
    with pytest.raises(ValueError, match="has 3 tokens, and this model reads 2: shorten it"):
        token_ids(tokenizer, ["", "brown hair"], 2)
    with pytest.raises(ValueError, match="width must be a multiple of heads=5, got 24"):
        TextEncoderConfig(width=24, heads=5)
    with pytest.raises(ValueError, match=r"out_layers must lie in 0 … 2, got 3"):
        TextEncoderConfig(width=24, heads=3, layers=2, out_layers=(1, 3))
