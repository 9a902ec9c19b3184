"""The three forms of what is left over of whole tiles: one result, forward and backward, dense and in 8 bits."""

import pytest
import torch

from diffusion_opt.kernels.launch import LAUNCH, LaunchConfig

pytest.importorskip("triton")
from diffusion_opt.kernels.attention.dense import backward, forward
from diffusion_opt.kernels.attention.eight_bit import forward as eight_bit
from diffusion_opt.kernels.attention.eight_bit import int8_attention_with_lse

FORMS = ("loop", "peeled", "inside")


def tile(form: str) -> LaunchConfig:
    return LaunchConfig(16, 32, 4, 2, form)


@pytest.mark.interpreted
@pytest.mark.parametrize("lk", [70, 64, 5])
@pytest.mark.parametrize("kind", ["none", "bias"])
def test_forms_of_the_dense_kernels_agree_to_the_bit(monkeypatch, kind, lk):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, n, 16, generator=generator) for n in (37, lk, lk, 37))
    mask = None if kind == "none" else torch.randn(1, 1, 37, lk, generator=generator)
    results = []
    for form in FORMS:
        monkeypatch.setattr(forward, "launch", lambda *_, form=form: tile(form))
        monkeypatch.setattr(backward, "launch", lambda *_, form=form: tile(form))
        out, lse = forward.forward(q, k, v, mask, 0.3)
        grads = backward.backward(grad, torch.ones_like(lse), q, k, v, mask, out, lse, 0.3)
        results.append((out, lse, *grads))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("values_in", ["fp16", "fp8"])
def test_forms_of_the_8_bit_kernel_agree_to_the_last_bits(monkeypatch, values_in):
    """Bounds-checked tiles multiply scores before they are compared, the others after: one rounding differs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 32, generator=generator) for n in (37, 70, 70))
    results = []
    for form in FORMS:
        monkeypatch.setattr(eight_bit, "launch", lambda *_, form=form: tile(form))
        results.append(int8_attention_with_lse(q, k, v, values_in=values_in))
    assert all(torch.equal(one, other) for one, other in zip(results[0], results[1], strict=True))
    torch.testing.assert_close(results[2], results[0], rtol=2e-3, atol=2e-3)


def test_asynchronous_matrix_instructions_never_stand_before_a_second_loop():
    rows = [name for name in LAUNCH if name.startswith("dense") and "fp32" not in name]
    rows += [name for name in LAUNCH if name.startswith("int8_scores_fp16_values")]
    for name in rows:
        assert all(choice.form != "loop" for choice in LAUNCH[name][90].values()), name
