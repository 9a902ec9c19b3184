"""Sizes and fresh weights: the zero function, the same for the same seed, and the promised number of parameters."""

import pytest
import torch

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models import SIZES, TinyFlux2Config, build_pipeline, velocity_model

SMALL = TinyFlux2Config(image_size=12, num_heads=2, head_dim=8, channels=3, class_names=("Cat", "dog"), text_dim=20)


@pytest.mark.parametrize(("name", "millions", "tokens"), [("fashion", 4.6, 49), ("fashion-micro", 1.2, 16)])
def test_shipped_sizes(name, millions, tokens):
    pipe = build_pipeline(SIZES[name])
    num = sum(p.numel() for part in (pipe.transformer, pipe.class_embedder) for p in part.parameters())
    assert num / 1e6 == pytest.approx(millions, abs=0.05)
    image = torch.zeros(1, 1, SIZES[name].image_size, SIZES[name].image_size)
    assert velocity_model(pipe).pack(image)[0].shape == (1, tokens, 16)


def test_fresh_weights_are_the_zero_function():
    model = velocity_model(build_pipeline(SMALL))
    v = model(torch.randn(2, 3, 12, 12), torch.tensor([0.2, 0.9]), ClassCondition(torch.tensor([0, 1]), 2))
    assert v.shape == (2, 3, 12, 12) and (v == 0).all()


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = (build_pipeline(SMALL, seed=s).transformer.state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["x_embedder.weight"], other["x_embedder.weight"])


def test_color_pictures_and_own_classes():
    pipe = build_pipeline(SMALL)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["cat", "DOG", 1], num_inference_steps=1, output_type="pt").images.shape == (3, 3, 12, 12)
    assert pipe("Cat", num_inference_steps=1).images[0].mode == "RGB"


@pytest.mark.parametrize(
    ("wrong", "message"), [({"image_size": 18}, "multiple of 4.*got 18"), ({"head_dim": 12}, "got 12")]
)
def test_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        TinyFlux2Config(**{"image_size": 16, "num_heads": 2} | wrong)
