"""Settings: read once, from four variables, with errors that name the variable."""

import pytest
import torch

from diffusion_opt.lesson import Settings, budget, settings

VARIABLES = ("FAST", "DEVICE", "SEED", "THREADS")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"DIFFUSION_OPT_{name}", raising=False)
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_defaults():
    found = settings()
    assert (found.fast, found.device, found.seed) == (False, "cpu", 0)
    assert found.threads >= 1


def test_all_four_variables_are_read(monkeypatch):
    for name, value in zip(VARIABLES, ("1", "cpu:0", "7", "3"), strict=True):
        monkeypatch.setenv(f"DIFFUSION_OPT_{name}", value)
    assert settings() == Settings(fast=True, device="cpu:0", seed=7, threads=3)


def test_the_environment_is_read_once(monkeypatch):
    before = settings()
    monkeypatch.setenv("DIFFUSION_OPT_FAST", "1")
    assert settings() is before


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FAST", "yes", "must be 1 .* got 'yes'"),
        ("DEVICE", "toaster", "torch device .* got 'toaster'"),
        ("SEED", "-1", "at least 0, got '-1'"),
        ("THREADS", "0", "at least 1, got '0'"),
        ("THREADS", "two", "at least 1, got 'two'"),
    ],
)
def test_a_bad_value_is_named(monkeypatch, name, value, words):
    monkeypatch.setenv(f"DIFFUSION_OPT_{name}", value)
    with pytest.raises(ValueError, match=f"DIFFUSION_OPT_{name}.*{words}"):
        settings()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present, so asking for one is no error")
def test_a_missing_gpu_is_an_error_at_once(monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_DEVICE", "cuda")
    with pytest.raises(ValueError, match="finds no CUDA device"):
        settings()


def test_budget_follows_the_size(monkeypatch):
    assert budget(full=400, fast=8) == 400
    monkeypatch.setenv("DIFFUSION_OPT_FAST", "1")
    settings.cache_clear()
    assert budget(full=400, fast=8) == 8


def test_budget_refuses_a_fast_size_above_the_full_one():
    with pytest.raises(ValueError, match="fast=9 and full=8"):
        budget(full=8, fast=9)


def test_generators_differ_by_offset_and_repeat_by_seed():
    first, again, other = (torch.randn(5, generator=settings().generator(offset)) for offset in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
