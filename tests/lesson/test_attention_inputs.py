"""Listening to a network's attention: every call, in order, and without changing anything."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffusion_opt.lesson.attention_inputs import listen
from diffusion_opt.models import load


@pytest.mark.parametrize("by_name", [False, True])
def test_q_k_and_v_are_those_of_the_call(by_name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 7, generator=generator).transpose(1, 2) for n in (5, 4, 4))
    want = scaled_dot_product_attention(q, k, v, scale=0.3)
    with listen() as heard:
        if by_name:
            out = scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3)
        else:
            out = scaled_dot_product_attention(q, k, v, scale=0.3)
    assert torch.equal(out, want)
    assert len(heard) == 1 and all(torch.equal(a, b) for a, b in zip(heard[0], (q, k, v), strict=True))
    assert all(x.is_contiguous() for x in heard[0])


def test_behind_the_block_nobody_listens():
    x = torch.ones(1, 1, 2, 3)
    with listen() as heard:
        pass
    scaled_dot_product_attention(x, x, x)
    assert heard == []


def test_every_block_of_every_pass_is_heard():
    pipe = load("fashion-micro")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config

    def picture():
        return pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    with listen() as heard:
        listened = picture()
    blocks = config.num_layers + config.num_single_layers
    assert len(heard) == 2 * 2 * blocks  # two steps, with and without the class
    tokens = pipe.vae.config.sample_size**2 // 4**2 + 1
    assert heard[0][1].shape == (1, config.num_attention_heads, tokens, config.attention_head_dim)
    assert torch.equal(picture(), listened)
