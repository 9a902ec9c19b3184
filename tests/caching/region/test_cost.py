"""The arithmetic of a pass over some tokens: (active + text) / all, linear layers and attention alike."""

import pytest
import torch
from caching.region.script import scripted
from torch import Tensor, nn

from diffusion_opt.evaluation import count
from diffusion_opt.models import TinyFlux2Config, build_pipeline, position_ids

SIDE = 32
TOKENS = SIDE * SIDE


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    """Hidden size 256, as the shipped model's."""
    return build_pipeline(TinyFlux2Config(image_size=4 * SIDE, num_heads=4)).transformer


def inputs(num_text: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, TOKENS, 16),
        "encoder_hidden_states": torch.randn(1, num_text, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": position_ids(SIDE, SIDE, torch.device("cpu")),
        "txt_ids": torch.zeros(num_text, 4),
        "return_dict": False,
    }


@pytest.mark.parametrize(("share", "num_text"), [(0.5, 1), (0.25, 1), (0.25, 64), (0.125, 1)])
def test_macs_follow_the_model_within_two_percent(wide, share, num_text):
    given = inputs(num_text)
    with scripted(wide) as (script, _):
        dense = count(lambda: wide(**given)).macs
        script.index = torch.arange(round(share * TOKENS))
        partial = count(lambda: wide(**given)).macs
    expected = (share * TOKENS + num_text) / (TOKENS + num_text)
    assert partial / dense == pytest.approx(expected, rel=0.02)
