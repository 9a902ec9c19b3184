"""A text encoder of the class that FLUX.2 klein has, `Qwen3ForCausalLM`, small enough to train beside the transformer.

FLUX.2 klein (Black Forest Labs 2026) reads a prompt with Qwen3 and takes the hidden states of three layers side by side
as the text stream. The class here is the same with small numbers in its config, so the stock pipeline runs it without
an override. Three things differ, each for its reason:

- **Words.** The tokenizer is a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) learned from the prompts of the
  data, so a known word is one token and an unknown one falls into pieces. A prompt of 12 words costs 13 tokens.
- **Template.** FLUX.2's chat template adds 8 tokens. The one here takes the bare words, in lower case, without commas
  and without `SILENT` ones, and `<|im_end|>`, so the empty prompt of guidance has one token too.
- **Start.** Word embeddings begin with deviation 0.5, not 0.02: the lower layers are handed to the transformer without
  a norm, and with 0.02 it would see nothing of the prompt at first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% set words = messages[0]['content'].lower().replace(',', ' ').split()"
    " | reject('in', ['a', 'an', 'the', 'and', 'with']) | list %}"
    "{% if words %}{{ ' ' ~ words | join(' ') }}{% endif %}<|im_end|>"
)
SILENT = ("a", "an", "the", "and", "with")  # words that say nothing here, left out as in the template
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """Size of the encoder. Raises ValueError for a width that the heads do not share evenly and unknown layers."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    out_layers: tuple[int, ...] = (1, 2, 3)  # hidden states that make the text stream: 0 the words, `layers` the last
    max_tokens: int = 28  # of a prompt, `<|im_end|>` included; shorter ones are padded, as in FLUX.2
    vocabulary: int = 1024  # at most

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}, got {self.width}")
        if wrong := [layer for layer in self.out_layers if not 0 <= layer <= self.layers]:
            raise ValueError(f"out_layers must lie in 0 … {self.layers}, got {wrong[0]}")

    @property
    def text_width(self) -> int:
        """Numbers of a token in the text stream."""
        return self.width * len(self.out_layers)


def build_tokenizer(prompts: Iterable[str], vocabulary: int = 1024) -> Qwen2TokenizerFast:
    """A tokenizer whose words are those of the prompts; the same prompts in the same order give the same one."""
    learner = Qwen2TokenizerFast().backend_tokenizer  # it splits texts as the loaded tokenizer will
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[PAD, START, END], show_progress=False
    )
    learner.train_from_iterator((" " + " ".join(words(prompt)) for prompt in prompts), trainer)
    tokenizer = Qwen2TokenizerFast(tokenizer_object=learner, unk_token=PAD, pad_token=PAD, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def words(prompt: str) -> list[str]:
    """The words of a prompt as the template hands them on."""
    return [word for word in prompt.lower().replace(",", " ").split() if word not in SILENT]


def build_text_encoder(tokenizer: Qwen2TokenizerFast, config: TextEncoderConfig, seed: int = 0) -> Qwen3ForCausalLM:
    """An encoder with fresh weights, the same for the same seed (the global random state is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=config.width,
                intermediate_size=3 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                head_dim=config.width // config.heads,
                tie_word_embeddings=True,
                max_position_embeddings=max(64, config.max_tokens),
                initializer_range=0.05,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
        nn.init.normal_(encoder.model.embed_tokens.weight, std=0.5)
    return encoder.eval()


def token_ids(
    tokenizer: Qwen2TokenizerFast, prompts: Sequence[str], length: int
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """Token numbers and attention mask (B, length) of prompts, as `Flux2KleinPipeline` makes them.

    Raises ValueError for a prompt of more tokens, which the stock pipeline would cut without a word.
    """
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False) for prompt in prompts]
    found = tokenizer(texts, padding="max_length", max_length=length, truncation=False, return_tensors=None)
    for prompt, ids in zip(prompts, found["input_ids"], strict=True):
        if len(ids) > length:
            raise ValueError(f"the prompt {prompt!r} has {len(ids)} tokens, and this model reads {length}: shorten it")
    return torch.tensor(found["input_ids"]), torch.tensor(found["attention_mask"])


def encoded(
    encoder: nn.Module, ids: Int[Tensor, "b l"], mask: Int[Tensor, "b l"], out_layers: Sequence[int]
) -> Float[Tensor, "b l d"]:
    """The text stream: hidden states of some layers side by side. `encoder` is the model or the causal model."""
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer] for layer in out_layers], dim=-1)
