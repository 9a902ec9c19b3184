"""Counted arithmetic equals the count by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_opt.evaluation import UncountedWorkError, count


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_mlp_is_exact(mode) -> None:
    mlp = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 3, bias=False))
    with mode():
        cost = count(lambda: mlp(torch.randn(5, 7)), mlp)
    assert cost.macs == 5 * 7 * 11 + 5 * 11 * 3
    assert cost.nfe == 1


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_exact(masked: bool) -> None:
    batch, heads, queries, keys, width = 2, 3, 5, 7, 8
    query = torch.randn(batch, heads, queries, width)
    key = torch.randn(batch, heads, keys, width)
    mask = torch.ones(queries, keys, dtype=torch.bool) if masked else None
    cost = count(lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask))
    assert cost.macs == 2 * batch * heads * queries * keys * width


def test_convolution_is_exact() -> None:
    layer = nn.Conv2d(3, 5, kernel_size=3, stride=2, padding=1)
    assert count(lambda: layer(torch.randn(2, 3, 8, 6))).macs == 2 * (4 * 3) * 5 * 3 * 9


@pytest.mark.filterwarnings("ignore")  # torch.ao announces its successor
def test_int8_linears_count_like_float_ones() -> None:
    mlp = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3))
    packed = torch.ao.quantization.quantize_dynamic(mlp, {nn.Linear}, dtype=torch.qint8)
    inputs = torch.randn(2, 5, 7)
    assert count(lambda: packed(inputs)).macs == count(lambda: mlp(inputs)).macs == 10 * (7 * 11 + 11 * 3)


def test_int8_matrix_product_is_exact() -> None:
    left, right = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    assert count(lambda: torch._int_mm(left, right)).macs == 32 * 16 * 8


def test_flux2_transformer_is_exact() -> None:
    from diffusers import Flux2Transformer2DModel

    batch, image, text, channels, joint, time_channels, width, singles = 3, 9, 2, 16, 24, 20, 32, 2
    model = Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint,
        timestep_guidance_channels=time_channels,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    inputs = {
        "hidden_states": torch.randn(batch, image, channels),
        "encoder_hidden_states": torch.randn(batch, text, joint),
        "timestep": torch.ones(batch),
        "img_ids": torch.zeros(image, 4),
        "txt_ids": torch.zeros(text, 4),
    }
    with torch.no_grad():
        cost = count(lambda: [model(**inputs) for _ in range(2)], model)

    tokens, square = image + text, width * width
    attention = 2 * batch * tokens**2 * width
    embedders = batch * (image * channels * width + text * joint * width)
    time = batch * (time_channels * width + square)
    modulation = batch * (6 + 6 + 3) * square
    double = batch * tokens * (3 + 1 + 6 + 3) * square + attention
    single = batch * tokens * ((3 + 6) + (1 + 3)) * square + attention
    head = batch * 2 * square + batch * image * width * channels
    assert cost.macs == 2 * (embedders + time + modulation + double + singles * single + head)
    assert cost.nfe == 2


def test_work_without_a_formula_is_an_error() -> None:
    library = torch.library.Library("evaluation_test", "DEF")
    library.define("mystery_mm(Tensor a, Tensor b) -> Tensor")
    library.impl("mystery_mm", lambda a, b: torch.from_numpy(a.numpy() @ b.numpy()), "CPU")
    product = torch.ops.evaluation_test.mystery_mm
    with pytest.raises(UncountedWorkError, match=r"evaluation_test.mystery_mm.*register_flop_formula"):
        count(lambda: product(torch.ones(2, 3), torch.ones(3, 4)))


def test_hooks_are_gone_after_a_failed_run() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(lambda: layer(torch.ones(1, 3)), layer)
    assert not layer._forward_hooks
