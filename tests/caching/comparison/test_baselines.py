"""Other libraries' caches: what runs leaves no trace, and what fails today is pinned so that an upgrade is noticed.

A test marked xfail says what should be; it is strict, so the day a library repairs it the test fails and the mark goes.
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from diffusers import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig, TextKVCacheConfig
from small_transformers import family_pipeline, family_sample

from diffusion_opt.caching.comparison.baselines import (
    CacheDit,
    CannotRunError,
    DiffusersCache,
    faster_cache,
    first_block,
    mag_cache,
    pyramid_attention,
    taylor_seer,
)
from diffusion_opt.evaluation import count

STEPS = 5
BLOCKS = {"flux2": 4, "ltx2": 2, "wan": 2, "ltx": 2}  # of FLUX.2 two of each kind: cache-dit computes one of both
RATIOS = (1.0, 1.02, 0.99, 1.01, 0.98)
MODULES = (r"^(transformer_|single_transformer_)?blocks\.\d+\.(attn\d?|ff|ffn)",)
MASK = (True, True, False, True, False)
TWO_PASSES = ("flux2", "wan")
CACHES: dict[str, Callable] = {
    "first block": lambda family: first_block(100.0),
    "MagCache": lambda family: mag_cache(9.0, RATIOS, 2, 0.2),
    "TaylorSeer, light": lambda family: taylor_seer(3),
    "TaylorSeer, modules": lambda family: taylor_seer(3, identifiers=MODULES),
    "PAB": lambda family: pyramid_attention(2),
    "FasterCache": lambda family: faster_cache(2),
    "cache-dit": lambda family: CacheDit(STEPS, family in TWO_PASSES, 100.0),
    "cache-dit, mask": lambda family: CacheDit(STEPS, family in TWO_PASSES, mask=MASK, order=1),
}
D1 = "diffusers 0.42: FLUX.2's two block lists hand different things on"
D2 = "diffusers 0.42: LTX-2's block is not in the registry"
PATCH = "cache-dit 1.5: its patched forward of LTX-2 lacks an argument of diffusers 0.42"
FAILS = {
    ("flux2", "first block"): D1,
    ("ltx2", "first block"): D2,
    ("ltx2", "MagCache"): D2,
    ("ltx2", "cache-dit"): PATCH,
    ("ltx2", "cache-dit, mask"): PATCH,
}


def cases() -> list:
    return [
        pytest.param(
            family,
            name,
            marks=pytest.mark.xfail(raises=CannotRunError, strict=True, reason=FAILS[family, name])
            if (family, name) in FAILS
            else (),
        )
        for family in ("flux2", "ltx2", "wan", "ltx")
        for name in CACHES
    ]


def cost_and_output(pipe, cache) -> tuple[int, torch.Tensor]:
    made = []

    def run() -> None:
        with cache.on(pipe):
            made.append(family_sample(pipe, STEPS))

    return count(run).macs, made[0]


@pytest.fixture(scope="module")
def pipes():
    """Per family: the pipeline, its uncached output and what that costs."""
    made = {}

    def get(family: str):
        if family not in made:
            pipe, plain = family_pipeline(family, blocks=BLOCKS[family]), []
            macs = count(lambda: plain.append(family_sample(pipe, STEPS))).macs
            made[family] = pipe, plain[0], macs
        return made[family]

    return get


@pytest.mark.parametrize(("family", "name"), cases())
def test_it_runs_spares_work_and_repeats(pipes, family, name):
    if name.startswith("cache-dit"):
        pytest.importorskip("cache_dit")
    pipe, plain, macs = pipes(family)
    cache = CACHES[name](family)
    spent, output = cost_and_output(pipe, cache)
    assert spent < 0.95 * macs
    assert not torch.equal(output, plain)
    with cache.on(pipe):
        assert torch.equal(family_sample(pipe, STEPS), output)  # nothing is carried into the next generation


@pytest.mark.parametrize("family", ["flux2", "ltx2"])
def test_no_trace_is_left_even_by_what_failed(pipes, family):
    """Also the order of the block lists: cache-dit swaps it, and diffusers' MagCache then breaks."""
    pipe, plain, _ = pipes(family)
    parts = [name for name, _ in pipe.transformer.named_modules()]
    attributes = {name: set(vars(part)) for name, part in pipe.transformer.named_modules()}
    for make in (*CACHES.values(), CACHES["MagCache"]):
        try:
            with make(family).on(pipe):
                family_sample(pipe, 2)
        except CannotRunError:
            pass
    assert [name for name, _ in pipe.transformer.named_modules()] == parts
    left = {name: set(vars(part)) - attributes[name] for name, part in pipe.transformer.named_modules()}
    assert set().union(*left.values()) <= {"_diffusers_hook", "forward"}
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(family_sample(pipe, STEPS), plain)


def test_the_reason_is_the_librarys_own(pipes):
    with pytest.raises(CannotRunError, match=r"FirstBlockCache at 0.1 fails on Flux2.*TypeError: unsupported operand"):
        cost_and_output(pipes("flux2")[0], first_block(0.1))
    with pytest.raises(CannotRunError, match=r"LTX2VideoTransformer3DModel: ValueError: Model class .* not registered"):
        cost_and_output(pipes("ltx2")[0], first_block(0.1))


def test_cache_dit_is_optional(pipes, monkeypatch):
    find = importlib.util.find_spec  # only this one package is missing: other libraries keep what they once looked up
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "cache_dit" else find(name, *at))
    with (
        pytest.raises(CannotRunError, match=r"pip install cache-dit==1\.5\.3"),
        CacheDit(STEPS, True).on(pipes("flux2")[0]),
    ):
        pass


# What diffusers 0.42.1 takes in silence.


@pytest.mark.parametrize("family", ["wan", "ltx"])
@pytest.mark.xfail(raises=CannotRunError, strict=True, reason="its default pattern misses attn1 and attn2")
def test_default_taylor_seer_finds_modules(pipes, family):
    cost_and_output(pipes(family)[0], DiffusersCache("TaylorSeer", lambda pipe: TaylorSeerCacheConfig()))


@pytest.mark.parametrize(
    "family",
    [
        "flux2",
        "ltx",
        pytest.param("ltx2", marks=pytest.mark.xfail(raises=CannotRunError, strict=True, reason=D2)),
    ],
)
def test_sea_cache_fails_open(pipes, family):
    """It computes everything without a word, because these pipelines do not tell it the step."""
    pipe, plain, macs = pipes(family)
    spent, output = cost_and_output(pipe, DiffusersCache("SeaCache", lambda pipe: SeaCacheConfig(threshold=9.0)))
    assert spent == macs
    assert torch.equal(output, plain)


@pytest.mark.parametrize("family", ["flux2", "ltx2", "wan", "ltx"])
@pytest.mark.xfail(raises=(AssertionError, CannotRunError), strict=True, reason="TextKV acts on NucleusMoE alone")
def test_text_kv_cache_spares_work(pipes, family):
    pipe, _, macs = pipes(family)
    assert cost_and_output(pipe, DiffusersCache("TextKV", lambda pipe: TextKVCacheConfig()))[0] < macs


@pytest.mark.xfail(strict=True, reason="one state for both guidance passes: the second gets the first's attention")
def test_pyramid_attention_keeps_the_guidance_passes_apart(pipes):
    """Every second call of an attention is skipped: not each pass in half the steps, but one of the two in all."""
    pipe, passes, computed = pipes("flux2")[0], [], []
    counter = pipe.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    listener = pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(
        lambda *_: computed.append(("first", "second")[(len(passes) - 1) % 2])
    )
    try:
        with pyramid_attention(2).on(pipe):
            family_sample(pipe, STEPS)
    finally:
        counter.remove()
        listener.remove()
    assert len(computed) == STEPS == len(passes) / 2
    assert "second" in computed


@pytest.mark.xfail(strict=True, reason="cache-dit 1.5 refreshes one call late when it is given a transformer alone")
def test_cache_dit_repeats_without_a_refresh():
    cache_dit = pytest.importorskip("cache_dit")
    pipe = family_pipeline("wan", blocks=4)
    config = CacheDit(STEPS, True, 100.0)._config()
    cache_dit.enable_cache(pipe.transformer, cache_config=config)
    try:
        first, second = (family_sample(pipe, STEPS) for _ in range(2))
    finally:
        cache_dit.disable_cache(pipe.transformer)
    assert torch.equal(first, second)


@pytest.mark.xfail(raises=TypeError, strict=True, reason=D1)
def test_first_block_cache_of_diffusers_by_itself():
    """The same as above without our wrapper, so that the failure is theirs."""
    pipe = family_pipeline("flux2", blocks=2)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    family_sample(pipe, 2)
