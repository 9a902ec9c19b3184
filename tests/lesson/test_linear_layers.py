"""Inputs of a layer, and other weights for a while."""

import pytest
import torch
from torch import nn

from diffusion_opt.lesson.linear_layers import changed_weights, layer_inputs

MODEL = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


@torch.no_grad()
def test_inputs_are_those_of_all_passes_one_row_a_token():
    first, second = torch.randn(2, 4, 3), torch.randn(1, 7, 3)
    found = layer_inputs(MODEL[2], lambda: (MODEL(first), MODEL(second)))
    passes = [MODEL[0](x).relu().flatten(0, -2) for x in (first, second)]
    assert torch.equal(found, torch.cat(passes)) and not MODEL[2]._forward_pre_hooks


def test_a_layer_that_nothing_went_through_is_refused():
    with pytest.raises(ValueError, match="nothing went through"):
        layer_inputs(MODEL[2], lambda: None)
    assert not MODEL[2]._forward_pre_hooks


@torch.no_grad()
def test_weights_are_changed_inside_and_the_very_same_afterwards():
    x, before, pointers = torch.randn(4, 3), [MODEL[i].weight.clone() for i in (0, 2)], MODEL[0].weight.data_ptr()
    y = MODEL(x)
    with changed_weights([MODEL[0], MODEL[2]], lambda weight: 2 * weight):
        assert all(torch.equal(MODEL[i].weight, 2 * w) for i, w in zip((0, 2), before, strict=True))
        assert not torch.equal(MODEL(x), y)
    assert torch.equal(MODEL(x), y) and MODEL[0].weight.data_ptr() == pointers


def test_weights_come_back_after_an_error():
    before = MODEL[0].weight.clone()
    with pytest.raises(RuntimeError, match="inside"), changed_weights([MODEL[0]], torch.zeros_like):
        raise RuntimeError("inside")
    assert torch.equal(MODEL[0].weight, before)
    with pytest.raises(ValueError, match="keep their shape"), changed_weights(MODEL[::2], lambda w: w[:1]):
        pass
    assert torch.equal(MODEL[0].weight, before)
