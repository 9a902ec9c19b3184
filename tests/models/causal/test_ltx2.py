"""Layouts over a stock LTX-2: the masked pass over all chunks is what a stream gives chunk by chunk."""

import pytest
import small_transformers
import torch

from diffusion_opt.models.causal import CausalLTX2, Layout

K = 4


@pytest.fixture(scope="module")
def ltx2():
    torch.manual_seed(0)
    model = small_transformers._ltx2(2).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def given():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, K, 8, 1, 2, 3, generator=g), torch.randn(2, 5, small_transformers.TEXT_DIM, generator=g)


def test_a_stream_is_the_masked_pass(ltx2, given):
    clean, text = given
    noisy, causal = clean.flip(1), CausalLTX2(ltx2)
    times = torch.cat([torch.zeros(2, K), torch.full((2, K), 0.7)], 1)
    at_once = causal(torch.cat([clean, noisy], 1), times, text, Layout.teacher_forcing(K))[:, K:]
    for k in range(K):
        one = causal.denoise(noisy[:, k], 0.7, text, list(clean[:, :k].unbind(1)))
        torch.testing.assert_close(one, at_once[:, k], atol=1e-5, rtol=0)


def test_later_chunks_do_not_change_earlier_ones(ltx2, given):
    x, text = given
    times, causal = torch.full((2, K), 0.5), CausalLTX2(ltx2)
    other = x.clone()
    other[:, 2] += 1
    difference = (causal(other, times, text, Layout.causal(K)) - causal(x, times, text, Layout.causal(K))).abs()
    difference = difference.amax((0, 2, 3, 4, 5))
    assert (difference[:2] < 1e-6).all() and (difference[2:] > 1e-4).all()


def test_a_stream_with_window_and_sink_keeps_what_it_says(ltx2, given):
    x, text = given
    causal = CausalLTX2(ltx2, window=2, sink=1)
    past = list(x[:, :3].unbind(1))
    base = causal.denoise(x[:, 3], 1.0, text, past)
    unseen = [past[0], past[1] + 1, past[2]]
    assert torch.equal(causal.denoise(x[:, 3], 1.0, text, unseen), base)
    assert not torch.equal(causal.denoise(x[:, 3], 1.0, text, [past[0] + 1, *past[1:]]), base)


def test_what_cannot_be_served_is_refused(ltx2, given):
    x, text = given
    causal, times = CausalLTX2(ltx2), torch.zeros(2, K)
    with pytest.raises(ValueError, match="3 rows, and 4 chunks"):
        causal(x, times, text, Layout.causal(3))
    with pytest.raises(ValueError, match="one position for a token"):
        causal(x, times, text, Layout.causal(K, window=2, sink=1))
