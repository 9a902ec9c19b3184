"""A fingerprint tells models apart and does not look into their blocks."""

import pytest
import torch
from small_transformers import FAMILIES, small_transformer

from diffusion_opt.models.block_stack import block_stack
from diffusion_opt.models.fingerprint import fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_knows_the_model_and_forgives_its_blocks(family):
    transformer = small_transformer(family)
    print_ = fingerprint(transformer)
    assert fingerprint(small_transformer(family)) == print_
    assert fingerprint(small_transformer(family, seed=1)) != print_
    assert fingerprint(small_transformer(family, blocks=3)) != print_
    with torch.no_grad():
        next(block_stack(transformer).blocks[0].parameters()).add_(1)
        assert fingerprint(transformer) == print_
        transformer.proj_out.weight[0, 0] += 1
    assert fingerprint(transformer) != print_
