"""The causal Wan against the stock forward, an explicit mask, SkyReels-V2, and itself with a cache."""

import copy

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn import functional as F

from diffusion_opt.models.causal import CausalWan, Layout, kept
from diffusion_opt.models.causal.attention import ChunkAttention

B, K, FRAMES = 2, 6, 1


def chunks(frames=FRAMES, channels=5, num=K):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, num, channels, frames, 4, 6, generator=g)
    return x, torch.rand(B, num, generator=g), torch.randn(B, num, 3, 7, generator=g)


def whole(x):
    return x.transpose(1, 2).flatten(2, 3)


def test_full_layout_is_the_stock_forward(wan):
    x, _, text = chunks()
    text = text[:, :1].expand(-1, K, -1, -1)
    t = torch.tensor([0.3, 0.8])[:, None].expand(-1, K)
    stock = wan(whole(x), 1000 * t[:, 0], text[:, 0], return_dict=False)[0]
    ours = whole(CausalWan(wan)(x, t, text, Layout.full(K)))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def test_a_time_for_each_chunk_is_the_stock_forward_with_a_time_for_each_token(wan):
    """The other design, times (batch, tokens) on the whole video, as the oracle."""
    x, t, text = chunks()
    text = text[:, :1].expand(-1, K, -1, -1)
    tokens = 2 * 3 * FRAMES
    stock = wan(whole(x), 1000 * t.repeat_interleave(tokens, 1), text[:, 0], return_dict=False)[0]
    torch.testing.assert_close(whole(CausalWan(wan)(x, t, text, Layout.full(K))), stock, atol=1e-5, rtol=0)


class MaskedProcessor(WanAttnProcessor):
    """The stock self-attention with a mask over tokens: absolute positions, all chunks at once."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@pytest.mark.parametrize("window", [None, 4, 2, 1])
def test_windows_are_those_of_an_explicit_mask(wan, window):
    x, t, text = chunks()
    text = text[:, :1].expand(-1, K, -1, -1)
    tokens, oracle = 2 * 3 * FRAMES, copy.deepcopy(wan)
    mask = torch.zeros(K, K, dtype=torch.bool)
    for k in range(K):
        mask[k, list(kept(k, window))] = True
    mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    for block in oracle.blocks:
        block.attn1.set_processor(MaskedProcessor(mask))
    stock = oracle(whole(x), 1000 * t.repeat_interleave(tokens, 1), text[:, 0], return_dict=False)[0]
    ours = CausalWan(wan)(x, t, text, Layout.causal(K, window))
    torch.testing.assert_close(whole(ours), stock, atol=1e-5, rtol=0)


def test_blocks_of_two_frames_are_those_of_skyreels(wan):
    """SkyReels-V2 loads Wan's weights and masks blocks of two and more by itself."""
    config = {name: wan.config[name] for name in (
        "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
        "freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len",
    )}  # fmt: skip
    oracle = SkyReelsV2Transformer3DModel(**config, num_frame_per_block=2).eval()
    oracle.load_state_dict(wan.state_dict())
    x, t, text = chunks(frames=2)
    text = text[:, :1].expand(-1, K, -1, -1)
    theirs = oracle(
        whole(x), 1000 * t.repeat_interleave(2, 1), text[:, 0], enable_diffusion_forcing=True, return_dict=False
    )[0]
    ours = whole(CausalWan(wan)(x, t, text, Layout.causal(K)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (4, 0), (2, 1), (1, 0), (2, 2), (1, 2)])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_cache_is_the_block_causal_forward(wan, window, sink, frames):
    """Teacher forcing on [clean | noisy] gives at once what a stream with a cache gives chunk by chunk."""
    clean, _, text = chunks(frames)
    noisy = chunks(frames)[0].flip(1)
    causal = CausalWan(wan, window, sink)
    times = torch.cat([torch.zeros(B, K), torch.full((B, K), 0.7)], 1)
    layout = Layout.teacher_forcing(K, window, sink)
    at_once = causal(torch.cat([clean, noisy], 1), times, torch.cat([text, text], 1), layout)[:, K:]
    cache, one_by_one = causal.new_cache(), []
    for k in range(K):
        one_by_one.append(causal.denoise(noisy[:, k], 0.7, text[:, k], cache))
        causal.write(clean[:, k], text[:, k], cache)
    torch.testing.assert_close(torch.stack(one_by_one, 1), at_once, atol=1e-5, rtol=0)
    assert cache.numbers == list(kept(K, window, sink)[:-1])


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (3, 1), (1, 0)])
def test_the_fused_pass_is_two_passes(wan, window, sink):
    clean, _, text = chunks()
    noisy = clean.flip(1)
    causal = CausalWan(wan, window, sink)
    plain, fused = causal.new_cache(), causal.new_cache()
    for k in range(K - 1):
        causal.write(clean[:, k], text[:, k], plain)
        expected = causal.denoise(noisy[:, k + 1], 1.0, text[:, k + 1], plain)
        found = causal.write_and_denoise(clean[:, k], text[:, k], noisy[:, k + 1], 1.0, text[:, k + 1], fused)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert fused.numbers == plain.numbers


def test_each_chunk_has_its_own_action(wan):
    x, t, text = chunks()
    causal, layout = CausalWan(wan), Layout.causal(K)
    other = text.clone()
    other[:, 3] += 1
    difference = (causal(x, t, other, layout) - causal(x, t, text, layout)).abs().amax((0, 2, 3, 4, 5))
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-4).all()


def test_gradients_flow_through_a_layout(wan):
    x, t, text = chunks(num=3)
    wan.requires_grad_(True)
    CausalWan(wan, 2)(x, t, text, Layout.causal(3, 2)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wan.parameters())


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("fp8", 0.06)])
def test_eight_bits_are_near_and_smaller(wan, precision, most):
    clean, _, text = chunks()
    causal = CausalWan(wan, 4, 1)
    outs, sizes = [], []
    for kind in ("native", precision):
        cache = causal.new_cache(kind)
        for k in range(K - 1):
            causal.write(clean[:, k], text[:, k], cache)
        outs.append(causal.denoise(clean[:, -1], 1.0, text[:, -1], cache))
        sizes.append(cache.bytes)
    error = F.mse_loss(outs[1], outs[0]).sqrt() / outs[0].std()
    assert 0 < error < most
    assert sizes[1] < 0.4 * sizes[0]


def test_weights_and_plain_calls_stay_as_they_were_and_it_is_removable(wan):
    x, t, text = chunks()
    names = list(wan.state_dict())
    before = wan(whole(x), 1000 * t[:, 0], text[:, 0], return_dict=False)[0]
    causal = CausalWan(wan)
    assert list(wan.state_dict()) == names and all(isinstance(b.attn1.processor, ChunkAttention) for b in wan.blocks)
    assert torch.equal(wan(whole(x), 1000 * t[:, 0], text[:, 0], return_dict=False)[0], before)
    causal.remove()
    assert all(type(b.attn1.processor) is WanAttnProcessor for b in wan.blocks)
    with pytest.raises(ValueError, match="was removed"):
        causal(x, t, text, Layout.causal(K))


def test_a_failed_pass_leaves_nothing_behind(wan):
    x, _, text = chunks()
    causal = CausalWan(wan)
    cache = causal.new_cache()
    with pytest.raises(RuntimeError):
        causal.write(x[:, 0], text[:, 0, :, :5], cache)
    assert causal.board.under_way is None and not cache.numbers


def test_what_cannot_be_served_is_refused(wan):
    x, t, text = chunks()
    causal = CausalWan(wan)
    with pytest.raises(ValueError, match="served by ChunkAttention already"):
        CausalWan(wan)
    with pytest.raises(ValueError, match="window >= 1"):
        Layout.causal(4, 0)
    with pytest.raises(ValueError, match="multiples of the patch"):
        causal(x[..., :5], t, text, Layout.causal(K))
    with pytest.raises(ValueError, match="5 rows, and 6 chunks"):
        causal(x, t, text, Layout.causal(K - 1))
    long, times, words = (torch.cat([part] * 6, 1) for part in (x, t, text))
    with pytest.raises(ValueError, match="use a smaller window"):
        causal(long, times, words, Layout.causal(36))


@pytest.mark.wrong_shapes
def test_another_transformer_and_precision_are_refused(wan):
    with pytest.raises(ValueError, match="precision must be one of"):
        CausalWan(wan).new_cache("int4")
    with pytest.raises(ValueError, match="got Linear"):
        CausalWan(torch.nn.Linear(2, 2))
