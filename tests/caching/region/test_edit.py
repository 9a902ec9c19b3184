"""Masked editing: what is outside stays, what is inside is made anew, and a refresh at each step is the dense edit."""

import pytest
import torch
from small_pipelines import small_pipeline
from torch import Tensor

from diffusion_opt.caching.region import EditRegionCache, edit, region_report
from diffusion_opt.caching.region.edit import token_mask
from diffusion_opt.datasets import load_fashion_mnist


def box(size: int, top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_masks_of_pixels_become_tokens():
    assert token_mask(box(16, 4, 4, 4), 4, 4).nonzero()[:, 0].tolist() == [5]
    assert token_mask(box(16, 7, 4, 2), 4, 4).nonzero()[:, 0].tolist() == [5, 9]


def test_outside_the_mask_the_picture_stays():
    pipe = small_pipeline()
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = box(16, 4, 4, 8)
    out = edit(pipe, image, mask, ["0", "1"], steps=3, guidance_scale=1.0)
    torch.testing.assert_close(out[:, :, ~mask], (image[:, :, ~mask] + 1) / 2)
    assert not torch.allclose(out[:, :, mask], (image[:, :, mask] + 1) / 2, atol=0.05)


def test_a_refresh_at_each_step_changes_no_bit_and_the_region_is_given_back():
    pipe = small_pipeline()
    image, mask = torch.zeros(2, 1, 16, 16), box(16, 4, 4, 4)
    run = {"prompt": ["0", "1"], "steps": 3, "guidance_scale": 2.0}
    dense = edit(pipe, image, mask, **run)
    cache = EditRegionCache(refresh_every=1)
    cache.apply(pipe)
    assert torch.equal(edit(pipe, image, mask, **run), dense)
    assert pipe.transformer._diffusers_hook.hooks["diffusion_opt_region_cache"].session.mask is None


def test_errors_fall_with_the_refresh_and_work_with_the_mask(shipped):
    pipe, data = shipped("fashion"), load_fashion_mnist("test")
    image = data.images[data.labels == 8][:2]
    mask = box(28, 8, 8, 12)
    run = {"prompt": ["pullover"] * 2, "steps": 4}
    dense = edit(pipe, image, mask, **run)
    errors, work = [], []
    for every in (2, 4):
        cache = EditRegionCache(ring=1, refresh_every=every)
        cache.apply(pipe)
        out = edit(pipe, image, mask, **run)
        errors.append(float((out - dense)[:, :, mask].norm() / (2 * dense - 1)[:, :, mask].norm()) * 2)
        work.append(region_report(pipe).work)
        cache.remove(pipe)
    assert errors[0] < errors[1]
    assert work[1] < work[0] < 1


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="mask is empty"):
        edit(small_pipeline(), torch.zeros(1, 1, 16, 16), box(16, 0, 0, 0), ["0"], steps=2)
