import pytest
import torch
from diffusers import WanTransformer3DModel


def small_wan(**changes) -> WanTransformer3DModel:
    """Two layers, all sizes different, weights that make each part matter."""
    torch.manual_seed(3)
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 5,
        "out_channels": 4, "text_dim": 7, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    model = WanTransformer3DModel(**config | changes).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.fixture
def wan() -> WanTransformer3DModel:
    return small_wan()
