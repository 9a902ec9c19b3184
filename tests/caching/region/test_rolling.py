"""Past frames: attention through the cache equals block-causal attention over the whole video."""

import pytest
import torch
from caching.region.models import noise
from torch.nn import functional as F

from diffusion_opt.caching.region import RollingKeyValues

CHUNKS, SIZE = 5, 3
QUERY, KEY, VALUE = (noise(2, CHUNKS * SIZE, 2, 8, seed=seed) for seed in range(3))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def chunk(x: torch.Tensor, number: int) -> torch.Tensor:
    return x[:, number * SIZE : (number + 1) * SIZE]


def streamed(past: RollingKeyValues) -> torch.Tensor:
    out = []
    for n in range(CHUNKS):
        keys, values = past.extended(0, chunk(KEY, n), chunk(VALUE, n))
        out.append(attention(chunk(QUERY, n), keys, values))
        past.append([(chunk(KEY, n), chunk(VALUE, n))])
    return torch.cat(out, dim=1)


def visible(sink: int, window: int) -> torch.Tensor:
    """Which chunk sees which: itself, the sink, and the window before it."""
    mine, theirs = torch.arange(CHUNKS)[:, None], torch.arange(CHUNKS)
    seen = (theirs <= mine) & ((theirs < sink) | (theirs >= mine - window))
    return seen.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)


@pytest.mark.parametrize(("sink", "window"), [(0, CHUNKS), (1, 2), (2, 1), (0, 1)])
def test_attention_equals_that_under_the_mask(sink, window):
    out = streamed(RollingKeyValues(1, sink, window))
    mask = visible(sink, window)
    if sink:  # the first chunks fill the sink and then the window
        mask |= visible(0, sink + window) & (torch.arange(CHUNKS) < sink + window).repeat_interleave(SIZE)[:, None]
    torch.testing.assert_close(out, attention(QUERY, KEY, VALUE, mask))


def test_the_oldest_chunk_behind_the_sink_is_dropped():
    past = RollingKeyValues(1, sink=1, window=2)
    kept = []
    for n in range(CHUNKS):
        past.append([(chunk(KEY, n), chunk(VALUE, n))])
        kept.append(past.kept)
    assert kept == [(0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4)]
    assert past.bytes == 3 * 2 * chunk(KEY, 0).nbytes
    past.reset()
    assert past.kept == ()
    assert torch.equal(past.extended(0, KEY, VALUE)[0], KEY)


def test_reading_stores_nothing_and_layers_are_apart():
    past = RollingKeyValues(2, sink=0, window=3)
    past.append([(chunk(KEY, 0), chunk(VALUE, 0)), (chunk(KEY, 1), chunk(VALUE, 1))])
    for layer in (0, 1):
        keys, values = past.extended(layer, chunk(KEY, 4), chunk(VALUE, 4))
        assert torch.equal(keys, torch.cat([chunk(KEY, layer), chunk(KEY, 4)], dim=1))
        assert torch.equal(values, torch.cat([chunk(VALUE, layer), chunk(VALUE, 4)], dim=1))
    assert past.kept == (0,)


def test_fp8_is_smaller_and_close():
    exact, small = streamed(RollingKeyValues(1, 0, CHUNKS)), RollingKeyValues(1, 0, CHUNKS, precision="fp8")
    out = streamed(small)
    assert 0 < float((out - exact).norm() / exact.norm()) < 0.05
    assert small.bytes < 0.4 * 2 * KEY.nbytes


def test_useless_sizes_and_missing_layers_are_named():
    with pytest.raises(ValueError, match="window >= 1"):
        RollingKeyValues(1, sink=1, window=0)
    with pytest.raises(ValueError, match="each of 2 layers, got 1"):
        RollingKeyValues(2, 0, 1).append([(KEY, VALUE)])
