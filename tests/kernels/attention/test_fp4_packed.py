"""FP4 as FP4 matrix units read it: the numbers of the oracle, packed, and the forward pass on them."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.fp4 import oracle
from diffusion_opt.kernels.attention.fp4.packed import Packed, nibbles, pack, packed_nvfp4
from diffusion_opt.kernels.launch import LaunchConfig
from diffusion_opt.kernels.quantizers.oracle import KEY_BLOCK, quantize_nvfp4, smoothing_mean

NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def qkv(lq: int = 70, lk: int = 90, d: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, d, generator=generator) for n in (lq, lk, lk))
    return [q, k + 2 * torch.randn(d, generator=generator), v]


def numbers(x: Packed) -> Tensor:
    """What codes and block scales stand for, without the units."""
    codes = torch.stack([x.codes & 15, x.codes >> 4], -1).flatten(-2).long()
    values = NUMBERS[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return values * x.scales.float().repeat_interleave(16, -1)


def test_every_number_of_fp4_has_its_code():
    values = torch.cat([NUMBERS, -NUMBERS])
    bytes_ = nibbles(values)
    codes = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten()
    assert codes.tolist() == [*range(8), *range(8, 16)]


@pytest.mark.parametrize("along", ["channels", "tokens"])
def test_packed_numbers_are_those_of_the_oracle(along):
    _, k, _ = qkv()
    mean = smoothing_mean(k)[:, :, None] if along == "channels" else None
    exact, packed = quantize_nvfp4(k, KEY_BLOCK, along, mean), packed_nvfp4(k, KEY_BLOCK, along, mean)
    got = numbers(packed)
    assert torch.equal(packed.units, exact.scales)
    assert torch.equal((got if along == "channels" else got.mT)[:, :, :90], exact.values)
    assert got.abs().sum() == exact.values.abs().sum()  # what was padded is 0


@pytest.mark.wrong_shapes
def test_heads_of_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="heads of 24 are no multiple"):
        packed_nvfp4(torch.randn(1, 1, 64, 24), 64, "channels")


@pytest.mark.interpreted
@pytest.mark.parametrize(("lq", "lk"), [(70, 90), (3, 64)])
@pytest.mark.parametrize("smoothing", ["none", "qk"])
def test_products_of_codes_give_what_the_oracle_gives(smoothing, lq, lk):
    blackwell = pytest.importorskip("diffusion_opt.kernels.attention.fp4.blackwell", reason="Triton is on Linux only")
    q, k, v = qkv(lq, lk)
    want, want_lse, _ = oracle.attention_fp4(oracle.prepare(q, k, v, smoothing), None, 0.3, torch.float64)
    out = torch.empty_like(q)
    lse = blackwell.forward(pack(q, k, v, smoothing), 0.3, out, lk, LaunchConfig(32, 64, 4, 2))
    assert (lse - want_lse).abs().max() < 1e-5
    assert ((out - want).norm() / want.norm()).item() < 2e-3  # weights at a tie round either way


@pytest.mark.interpreted
def test_the_probe_says_what_is_wrong(monkeypatch):
    blackwell = pytest.importorskip("diffusion_opt.kernels.attention.fp4.blackwell", reason="Triton is on Linux only")
    monkeypatch.setattr(blackwell, "PROBED_QUERIES", 20)
    monkeypatch.setattr(blackwell, "PROBED_KEYS", 70)
    monkeypatch.setattr(blackwell, "chosen", lambda *_: {90: LaunchConfig(32, 64, 4, 2)})
    probe, device = blackwell.obstacle.__wrapped__, torch.device("cpu")
    assert probe(device, 16) is None
    honest = blackwell.forward

    def shifted(x: object, scale: float, out: Tensor, *rest: object) -> Tensor:
        lse = honest(x, scale, out, *rest)
        out.mul_(1.1)
        return lse

    monkeypatch.setattr(blackwell, "forward", shifted)
    assert probe(device, 16).startswith("the output differs from the simulation's by")

    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(blackwell, "forward", broken)
    assert probe(device, 16) == "they do not run here: no such instruction"
