"""Reference pictures and frames: what is reused, at which price, and diffusers' own cache beside it."""

import pytest
import torch
from caching.region.models import CASES, NUM_TOKENS, noise
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from torch import nn

from diffusion_opt.caching.region import ChunkAccumulators, ReferenceRegionCache
from diffusion_opt.caching.region.chunks import Chunks, References
from diffusion_opt.caching.region.session import attach, detach
from diffusion_opt.evaluation import count

REFERENCES = 8
TIMES = (0.9, 0.6, 0.3)


def with_references(time: float, seed: int = 0) -> dict:
    """A FLUX.2 call whose last tokens belong to a reference picture, with a frame number of its own."""
    call = CASES["flux2"].call(time)
    call["hidden_states"] = torch.cat([noise(2, NUM_TOKENS, 8, seed=seed), noise(2, REFERENCES, 8, seed=7)], dim=1)
    ids = call["img_ids"][:REFERENCES].clone()
    ids[:, 0] = 10
    call["img_ids"] = torch.cat([call["img_ids"], ids])
    return call


def run(module: nn.Module) -> list[torch.Tensor]:
    """Velocities of the picture's tokens over a few steps."""
    return [module(**with_references(time, seed=i))[0][:, :NUM_TOKENS] for i, time in enumerate(TIMES)]


def run_diffusers(module: nn.Module) -> list[torch.Tensor]:
    """The same with diffusers' cache, which wants the references first."""
    for block in module.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in module.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    first = with_references(TIMES[0])
    order = torch.cat([torch.arange(NUM_TOKENS, NUM_TOKENS + REFERENCES), torch.arange(NUM_TOKENS)])
    first |= {"hidden_states": first["hidden_states"][:, order], "img_ids": first["img_ids"][order]}
    velocity, cache = module(**first, kv_cache_mode="extract", num_ref_tokens=REFERENCES)
    out = [velocity]
    for i, time in enumerate(TIMES[1:], 1):
        call = CASES["flux2"].call(time) | {"hidden_states": noise(2, NUM_TOKENS, 8, seed=i)}
        out.append(module(**call, kv_cache_mode="cached", kv_cache=cache)[0])
    return out


@torch.no_grad()
def test_references_are_computed_once_and_the_first_step_is_dense():
    module = CASES["flux2"].made()
    dense = run(module)
    session = attach(module, References(0))
    cached = run(module)
    assert [p.num_computed for p in session.passes] == [NUM_TOKENS + REFERENCES, NUM_TOKENS, NUM_TOKENS]
    assert torch.equal(cached[0], dense[0])
    for mine, exact in zip(cached[1:], dense[1:], strict=True):
        assert 0 < float((mine - exact).norm() / exact.norm()) < 0.3
    detach(module)
    attach(module, ReferenceRegionCache(refresh_every=1).policy())
    assert all(map(torch.equal, run(module), dense))


@torch.no_grad()
def test_later_steps_cost_what_diffusers_cache_costs_and_the_first_is_the_models_own():
    ours, theirs = CASES["flux2"].made(), CASES["flux2"].made()
    dense = run(ours)
    attach(ours, References(0))
    other = run_diffusers(theirs)
    assert not torch.allclose(other[0], dense[0], atol=1e-3), "there references attend only to themselves"
    assert torch.equal(run(ours)[0], dense[0])
    call = CASES["flux2"].call(0.3)
    with ours.cache_context("cond"):
        ours(**with_references(0.6))
        reused = count(lambda: ours(**with_references(0.3)))
    _, cache = theirs(**with_references(0.9), kv_cache_mode="extract", num_ref_tokens=REFERENCES)
    cached = count(lambda: theirs(**call, kv_cache_mode="cached", kv_cache=cache))
    assert reused.macs == cached.macs < count(lambda: run(CASES["flux2"].made())).macs / 3


@torch.no_grad()
def test_a_call_without_references_says_so():
    module = CASES["flux2"].made()
    attach(module, References(0))
    with pytest.raises(ValueError, match="no reference"):
        module(**CASES["flux2"].call(0.9))


def test_each_chunk_has_its_own_sum():
    chunks = torch.tensor([0, 0, 1, 1, 2, 2])
    x = torch.ones(1, 6, 2)
    sums = ChunkAccumulators(threshold=0.25)
    assert sums.due(x, chunks).tolist() == [True] * 3
    rates = torch.tensor([0.0, 0.0, 0.1, 0.1, 0.3, 0.3])[None, :, None]
    due = []
    for _ in range(5):
        x = x + rates  # chunk 1 grows by 10 % of the first value, then by less
        due.append(sums.due(x, chunks).tolist())
    assert [d[0] for d in due] == [False] * 5
    assert [d[1] for d in due] == [False, False, True, False, False]
    assert due[0][2]


@torch.no_grad()
def test_still_frames_wait_and_threshold_zero_is_dense():
    case = CASES["ltx"]
    module = case.made()
    start = case.call(0.9)["hidden_states"]
    moving = torch.cat([torch.zeros(2, 12, 8), torch.ones(2, 12, 8)], dim=1)  # the second of two frames
    calls = [case.call(time) | {"hidden_states": start + i * moving} for i, time in enumerate(TIMES)]
    dense = [module(**call)[0] for call in calls]
    session = attach(module, Chunks(0.5))
    cached = [module(**call)[0] for call in calls]
    assert [p.num_computed for p in session.passes] == [NUM_TOKENS, 12, 12]
    assert torch.equal(cached[1][:, :12], cached[0][:, :12])
    assert not torch.equal(cached[1][:, 12:], cached[0][:, 12:])
    detach(module)
    attach(module, Chunks(0.0))
    assert all(torch.equal(module(**call)[0], exact) for call, exact in zip(calls, dense, strict=True))
