"""Low-precision attention inside torch.compile: one graph, the same numbers, the same gradient."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.kernels.attention.eight_bit.fp8 import fp8_attention
from diffusion_opt.kernels.attention.eight_bit.int8 import int8_attention
from diffusion_opt.kernels.attention.fp4.operator import fp4_attention
from diffusion_opt.kernels.fused.qk_norm_rope.operator import qk_norm_rope
from diffusion_opt.kernels.fused.qk_norm_rope.oracle import Rotation

pytestmark = pytest.mark.compiled


def heads(length: int) -> Tensor:
    return torch.randn(1, length, 2, 16).transpose(1, 2)


@pytest.mark.parametrize("attend", [int8_attention, fp8_attention, fp4_attention])
def test_one_graph_and_the_same_numbers(attend):
    q, k, v = heads(20), heads(30), heads(30)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attend(q, k, v))


def test_a_trained_block_has_the_same_gradient():
    def block(x: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        angle = torch.linspace(0, 1, 20)[:, None].expand(20, 8)[None, None]
        q = qk_norm_rope(x, weight, Rotation(angle.cos(), angle.sin(), "neighbors"))
        return fp4_attention(q, k, v).square().sum()

    inputs = [x.requires_grad_() for x in (heads(20), heads(30), heads(30), torch.rand(16))]
    expected = torch.autograd.grad(block(*inputs), inputs)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
