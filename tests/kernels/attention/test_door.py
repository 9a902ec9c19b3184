"""The front: the right operation for each call, a reason for each choice, and no silent replacement."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention import door as front
from diffusion_opt.kernels.attention.dense import specialized
from diffusion_opt.kernels.attention.door import CachedRegion, Choice, attention, choose, explain
from diffusion_opt.kernels.attention.fp4 import blackwell
from diffusion_opt.kernels.attention.region.operator import Region
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.operator import block_sparse_attention
from diffusion_opt.kernels.launch import LAUNCH

LOW = ("int8", "int8-fp8", "fp8", "nvfp4")


def qkv(
    lq: int = 70, lk: int = 50, d: int = 24, seed: int = 0, kind: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 3, lq, d), (2, 3, lk, d), (2, 3, lk, d))
    return tuple(torch.randn(size, generator=generator).to(kind) for size in sizes)


def relative(out: Tensor, want: Tensor) -> float:
    return float((out - want).norm() / want.norm())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions as they are taken on an sm_90 GPU; nothing is run."""
    pretend_gpu(monkeypatch, 90)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    monkeypatch.setattr(runtime, "mode", lambda tensor: "cuda")
    monkeypatch.setattr(runtime, "architecture", lambda device: arch)
    monkeypatch.setattr(specialized, "obstacle", lambda *_: None)  # what the device itself would be asked
    monkeypatch.setattr(blackwell, "obstacle", lambda *_: None)


def test_dense_is_torchs_attention_to_the_bit_on_a_cpu():
    q, k, v = qkv()
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attention(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3))


def test_masks_reach_every_precision():
    q, k, v = qkv()
    open_keys = torch.arange(50) < 20
    want = F.scaled_dot_product_attention(q, k[:, :, :20], v[:, :, :20])
    for precision in ("dense", *LOW):
        assert relative(attention(q, k, v, open_keys[None, None, None], precision=precision), want) < 0.2
        bias = torch.zeros(2, 1, 1, 50).masked_fill(~open_keys, -10000.0)
        assert relative(attention(q, k, v, bias, precision=precision), want) < 0.2


@pytest.mark.parametrize("precision", LOW)
def test_a_query_without_keys_gives_zeros_in_every_precision(precision):
    q, k, v = qkv()
    mask = torch.ones(70, 50, dtype=torch.bool)
    mask[7] = False
    out = attention(q, k, v, mask[None, None], precision=precision)
    assert not out[:, :, 7].any()
    assert out.isfinite().all()


def test_fewer_bits_cost_more_accuracy():
    q, k, v = qkv(128, 128, 64)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = [relative(attention(q, k, v, precision=precision), want) for precision in ("dense", *LOW)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6 < errors[1] and errors[-1] < 0.3


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["dense", *LOW])
def test_the_output_has_shape_and_type_of_q_and_inputs_stay_as_they_were(precision, kind):
    q, k, v = qkv(kind=kind)
    before = [x.clone() for x in (q, k, v)]
    out = attention(q, k, v, precision=precision)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_tiles_are_left_out():
    q, k, v = qkv(64, 48)
    table = torch.tensor([[True, False, True], [False, True, True]])
    tiles = BlockMask.from_dense(table[None, None], 32, 16)
    out = attention(q, k, v, sparsity=tiles)
    assert torch.equal(out, block_sparse_attention(q, k, v, tiles)[0])
    whole = table.repeat_interleave(32, 0).repeat_interleave(16, 1)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, whole))


def test_a_region_gives_the_rows_of_full_attention_and_updates_its_cache():
    q, k, v = qkv(50, 50)
    rows = torch.tensor([3, 8, 21])
    region = Region.from_index(rows.expand(2, 3).to(torch.int32), 50)
    old_k, old_v = k.clone(), v.clone()
    old_k[:, :, rows] = old_v[:, :, rows] = 0  # stale where active
    active = [x[:, :, rows] for x in (q, k, v)]
    out = attention(*active, sparsity=CachedRegion(region, old_k, old_v))
    assert torch.equal(old_k, k) and torch.equal(old_v, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v)[:, :, rows])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "dense attention by torch's scaled_dot_product_attention: q is on a CPU, where Triton kernels do not run"),
        ({"precision": "int8"}, "int8 attention by its PyTorch reference: q is on a CPU, where Triton"),
        (
            {"sparsity": BlockMask.from_dense(torch.ones(1, 1, 5, 4, dtype=torch.bool), 16, 16)},
            "block-sparse attention by its",
        ),
    ],
)
def test_explain_on_a_cpu(options, sentence):
    assert explain(*qkv(), **options).startswith(sentence)


def test_explain_on_a_gpu_names_the_kernel(hopper):
    place = "q is a CUDA tensor of bfloat16 with heads of 128"
    half = qkv(kind=torch.bfloat16, d=128)
    assert explain(*half) == f"dense attention by a Triton kernel for sm_90, its warps specialized: {place}"
    mask = torch.ones(half[0].shape[2], half[1].shape[2], dtype=torch.bool)
    assert "sm_90, its warps all of one kind (there is a mask): q is" in explain(*half, mask)
    for precision in LOW:
        assert "a Triton kernel for sm_90" in explain(*qkv(), precision=precision)


def test_explain_says_whether_fp4_is_real(monkeypatch):
    half = qkv(kind=torch.bfloat16, d=128)
    for arch, words in ((90, "that simulates FP4 (sm_90 has no FP4 matrix units)"), (120, "on FP4 matrix units: q is")):
        pretend_gpu(monkeypatch, arch)
        assert words in explain(*half, precision="nvfp4")
    monkeypatch.setattr(blackwell, "obstacle", lambda *_: "they do not run here: no such device")
    assert "that simulates FP4 (they do not run here: no such device)" in explain(*half, precision="nvfp4")


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (qkv(d=264), "head dimension 264"),
        (qkv(kind=torch.float64), "kernels compute in float16, bfloat16 or float32, and q is float64"),
    ],
    ids=["large heads", "float64"],
)
def test_dense_falls_back_to_torch_where_the_kernel_cannot_and_low_precision_refuses(hopper, q, reason):
    choice = choose(*q)
    assert choice.body == front.SDPA
    assert reason in choice.reason
    torch.testing.assert_close(choice.run(), F.scaled_dot_product_attention(*q))
    for precision in LOW:
        with pytest.raises(ValueError, match=reason):
            choose(*q, precision=precision)


def test_what_an_architecture_lacks_is_refused_before_anything_runs(monkeypatch):
    pretend_gpu(monkeypatch, 80)
    choose(*qkv(), precision="int8")
    for precision in ("int8-fp8", "fp8"):
        with pytest.raises(ValueError, match=r"no launch choice for sm_80; it runs on sm_89"):
            choose(*qkv(), precision=precision)


def test_a_gradient_without_a_kernel_is_torchs(monkeypatch):
    """The launch table has no tile for this gradient: the forward kernel alone would fail in the backward pass."""
    pretend_gpu(monkeypatch, 120)
    q, k, v = qkv(d=128)
    assert "Triton kernel" in explain(q, k, v)
    k.requires_grad_()
    choice = choose(q, k, v)
    assert choice.body == front.SDPA
    assert "'dense_keys_fp32' on sm_120 has no choice for heads of 128 numbers: no tile" in choice.reason
    with torch.no_grad():
        assert "Triton kernel" in explain(q, k, v)


def test_masks_have_their_own_rows(monkeypatch):
    pretend_gpu(monkeypatch, 90)
    monkeypatch.setitem(LAUNCH, "dense_forward_masked", {})
    q, k, v = qkv(kind=torch.bfloat16)
    mask = torch.ones(70, 50, dtype=torch.bool)[None, None]
    assert "Triton kernel" in explain(q, k, v)
    assert "'dense_forward_masked' has no launch choice for sm_90" in explain(q, k, v, mask)


def test_combinations_that_no_kernel_serves_are_refused():
    q, k, v = qkv(64, 48)
    tiles = BlockMask.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool), 32, 16)
    with pytest.raises(ValueError, match="no int8 kernel leaves out"):
        attention(q, k, v, precision="int8", sparsity=tiles)
    with pytest.raises(ValueError, match="takes no mask"):
        attention(q, k, v, torch.ones(1, 1, 1, 48, dtype=torch.bool), sparsity=tiles)
    with pytest.raises(ValueError, match="64 queries and 50 keys"):
        attention(q, *qkv(64, 50)[1:], sparsity=tiles)


@pytest.mark.wrong_shapes
def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="must be one of dense, int8, int8-fp8, fp8, nvfp4, got 'int4'"):
        attention(*qkv(), precision="int4")


def test_dense_gradients_pass_through_the_front():
    q, k, v = (x.requires_grad_() for x in qkv())
    attention(q, k, v).square().sum().backward()
    want = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    for x, gradient in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(x.grad, gradient)


def test_the_choice_reads_as_a_sentence():
    assert str(Choice(SimpleNamespace, "x attention", "a kernel", "because")) == "x attention by a kernel: because"


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", ["dense", "int8"])
def test_interpreted_kernels_are_named_and_give_what_the_references_give(precision, device):
    q, k, v = (x.to(device) for x in qkv(64, 40, 16))
    assert "Triton kernel" in explain(q, k, v, precision=precision)
    out = attention(q, k, v, precision=precision)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative(out, want) < (1e-6 if precision == "dense" else 0.05)
