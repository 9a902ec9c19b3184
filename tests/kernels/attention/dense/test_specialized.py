"""The forward kernel with warps of two kinds: the numbers of the plain one, and the reasons for not taking it."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense import oracle
from diffusion_opt.kernels.launch import LaunchConfig

pytest.importorskip("triton")
from diffusion_opt.kernels.attention.dense import forward as plain
from diffusion_opt.kernels.attention.dense import specialized

TILE = LaunchConfig(32, 32, 4, 2, "inside")


def qkv(lq: int = 33, lk: int = 70, d: int = 40, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, d, generator=generator).to(dtype) for n in (lq, lk, lk)]


@pytest.mark.interpreted
@pytest.mark.parametrize(("lq", "lk", "d"), [(33, 70, 40), (1, 1, 16), (32, 64, 64), (40, 31, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_gives_what_the_plain_kernel_gives(monkeypatch, lq, lk, d, dtype):
    q, k, v = qkv(lq, lk, d, dtype)
    monkeypatch.setattr(plain, "launch", lambda *_: TILE)
    expected = plain.forward(q, k, v, None, 0.3)
    for got, wanted in zip(specialized.forward(q, k, v, 0.3, TILE), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    exact, exact_lse = oracle.attention(q.double(), k.double(), v.double(), None, 0.3)
    out, lse = specialized.forward(q, k, v, 0.3, TILE)
    assert (lse - exact_lse).abs().max() < 2e-6
    roundings = 2 if dtype == torch.bfloat16 else 16  # bfloat16 rounds the output; float32 adds up its sums
    assert (out.double() - exact).abs().max() <= roundings * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.interpreted
def test_it_reads_views_and_writes_their_strides():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    out, _ = specialized.forward(q, k, v, 0.3, TILE)
    assert out.stride() == q.stride()
    torch.testing.assert_close(out, specialized.forward(*(x.contiguous() for x in (q, k, v)), 0.3, TILE)[0])


def test_descriptors_want_rows_at_multiples_of_16_bytes_without_gaps():
    q, k, v = qkv()
    assert specialized.fits(q, k, v)
    assert specialized.fits(q.transpose(1, 2).contiguous().transpose(1, 2))
    assert not specialized.fits(q, k.mT.contiguous().mT, v)  # channels are not neighbors
    assert not specialized.fits(qkv(d=41)[0])  # rows of 82 bytes
    assert not specialized.fits(torch.randn(1, 2, 33, 44)[..., 1:41])  # begins 4 bytes late


def test_the_plain_kernel_serves_what_the_table_or_the_probe_leaves_out(monkeypatch):
    monkeypatch.setattr(runtime, "architecture", lambda device: 90)
    monkeypatch.setattr(specialized, "obstacle", lambda *_: None)
    q, k, v = qkv(d=128)
    assert specialized.served(q, k, v, None).num_warps == 4
    assert specialized.served(q, k, v, torch.ones(33, 70, dtype=torch.bool)) is None
    assert specialized.served(q.float(), k.float(), v.float(), None) is None
    assert specialized.served(*qkv(d=256), None) is None
    assert specialized.served(*qkv(lk=0, d=128), None) is None
    monkeypatch.setattr(runtime, "architecture", lambda device: 120)
    assert specialized.served(q, k, v, None) is None
    monkeypatch.setattr(runtime, "architecture", lambda device: 90)
    monkeypatch.setattr(specialized, "obstacle", lambda *_: "it does not run here: no such device")
    assert specialized.served(q, k, v, None) is None


@pytest.mark.interpreted
def test_the_probe_compares_and_says_what_differs(monkeypatch):
    monkeypatch.setattr(specialized, "PROBED_QUERIES", 20)
    monkeypatch.setattr(specialized, "PROBED_KEYS", 40)
    monkeypatch.setattr(specialized, "chosen", lambda *_: {90: TILE})
    probe = specialized.obstacle.__wrapped__  # without its memory
    device = torch.device("cpu")
    assert probe(device, torch.bfloat16, 16) is None
    honest = specialized.forward
    monkeypatch.setattr(specialized, "forward", lambda *a: tuple(x * 1.5 for x in honest(*a)))
    assert probe(device, torch.bfloat16, 16).startswith("its output differs from the plain kernel's by")
    monkeypatch.setattr(specialized, "forward", lambda *a: tuple(x * torch.nan for x in honest(*a)))
    assert "differs" in probe(device, torch.bfloat16, 16)

    def broken(*_: object) -> None:
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(specialized, "forward", broken)
    assert probe(device, torch.bfloat16, 16) == "it does not run here: PassManager::run failed"
