"""Without weights, a call still knows what no weight decides."""

import torch
from torch import nn

from diffusion_opt.subjects.contents import LARGEST, keeps, known_contents


def test_a_mask_cuts_what_has_no_content_to_length():
    with known_contents():
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to("meta").bool()
        hidden = (
            torch.nn.functional.one_hot(torch.tensor([[0, 1, 1], [1, 0, 0]])).float()
            @ nn.Linear(5, 2, device="meta").weight
        )
        assert hidden.is_meta and hidden[mask].shape == (3, 5)
        assert mask.sum(1).tolist() == [2, 1] and bool(mask.all()) is False


def test_numbers_made_of_nothing_are_known_and_those_of_weights_are_not():
    with known_contents():
        zeros = torch.zeros(2, 3, device="meta")
        assert bool(torch.all(zeros == 0)) and torch.arange(4, device="meta").tolist() == [0, 1, 2, 3]
        assert torch.ones_like(nn.Linear(2, 2, device="meta").weight).is_meta is False
        sums = zeros + nn.Linear(3, 2, device="meta").weight
        assert sums.is_meta and sums.shape == (2, 3)
        assert sums.cpu().is_meta  # contents cannot come to where none are


def test_what_is_large_loses_its_contents():
    with known_contents():
        large = torch.ones(LARGEST + 1, dtype=torch.bool, device="meta")
        assert large.is_meta and not keeps(large)
        assert torch.ones(LARGEST + 1, dtype=torch.bool).to("meta").is_meta
    assert torch.zeros(2, device="meta").is_meta  # outside of the block nothing has changed
