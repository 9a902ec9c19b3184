"""With a GPU at hand: the interpreter's tests run compiled, and the front's kernels agree with their references."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_transformers import family_pass, small_transformer
from torch import Tensor

from diffusion_opt.kernels.attention.door import CachedRegion, attention, explain
from diffusion_opt.kernels.attention.region.operator import Region
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.diffusers_backend import BACKENDS, attention_backend
from diffusion_opt.quantization import W8A8Linear

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


def qkv(kind: torch.dtype, lq: int = 300, lk: int = 200, d: int = 128) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, length, d, generator=generator).to(kind) for length in (lq, lk, lk))


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.cuda() for x in tensors)


def relative(out: Tensor, want: Tensor) -> float:
    return float((out.double().cpu() - want.double()).norm() / want.double().norm())


def test_every_interpreted_test_passes_compiled():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreted", "tests/kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["dense", "int8", "int8-fp8", "fp8", "nvfp4"])
def test_kernels_agree_with_their_references(precision, kind):
    q, k, v = qkv(kind)
    assert "Triton kernel for sm_" in explain(*on_gpu(q, k, v), precision=precision)
    want = attention(q, k, v, precision=precision)
    assert relative(attention(*on_gpu(q, k, v), precision=precision), want) < (1e-4 if kind == torch.float32 else 2e-2)


@pytest.mark.parametrize("d", [40, 64, 72, 256])
def test_any_head_dimension_and_a_bias(d):
    q, k, v = qkv(torch.bfloat16, d=d)
    bias = torch.randn(2, 1, 1, 200, generator=torch.Generator().manual_seed(1))
    for precision in ("dense", "int8", "fp8", "nvfp4"):
        out = attention(*on_gpu(q, k, v, bias), precision=precision)
        assert relative(out, attention(q, k, v, bias, precision=precision)) < 2e-2


def test_sparse_and_region_kernels_agree_with_their_references():
    q, k, v = qkv(torch.bfloat16, 256, 192)
    table = torch.rand(1, 3, 4, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    want = attention(q, k, v, sparsity=BlockMask.from_dense(table, 64, 64))
    assert relative(attention(*on_gpu(q, k, v), sparsity=BlockMask.from_dense(table.cuda(), 64, 64)), want) < 2e-2
    rows = torch.arange(0, 192, 3)
    region = Region.from_index(rows.expand(2, -1).to(torch.int32), 192)
    active = [x[:, :, : len(rows)].contiguous() for x in (q, k, v)]
    want = attention(*active, sparsity=CachedRegion(region, k.clone(), v.clone()))
    there = Region.from_index(region.index.cuda(), 192)
    out = attention(*on_gpu(*active), sparsity=CachedRegion(there, *on_gpu(k, v)))
    assert relative(out, want) < 2e-2


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("family", ["flux2", "ltx2", "wan"])
def test_the_diffusers_backend_on_a_gpu_gives_what_it_gives_on_a_cpu(family, name):
    transformer, given = small_transformer(family, blocks=2), family_pass(family, 0.4)
    with torch.no_grad(), attention_backend(transformer, name):
        want = transformer(**given)[0]
        transformer.cuda()
        got = transformer(**{key: x.cuda() if isinstance(x, Tensor) else x for key, x in given.items()})[0]
    assert relative(got, want) < 2e-2


@pytest.mark.parametrize("numbers", ["int8", "e4m3"])
def test_w8a8_layers_on_a_gpu_give_what_they_give_on_a_cpu(numbers):
    layer = W8A8Linear(torch.nn.Linear(256, 144), numbers)
    x = torch.randn(2, 50, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = layer(x)
    assert relative(layer.cuda()(x.cuda()), want) < 2e-2
