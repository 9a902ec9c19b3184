"""The flow-map identity against the exact flow map of a Gaussian, and its methods on the small network."""

import pytest
import torch
from small_pipelines import small_pipeline

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory.flow_map import hop_target, limit_target, normalized_tangent
from diffusion_opt.distillation.trajectory.flow_map_distillation import (
    METHODS,
    FlowMapDistillation,
    FlowMapSettings,
    sample_times,
)
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided
from diffusion_opt.models import flow_map_transformer, velocity_model

MODES = GaussianMixtureVelocity.ring(num_modes=3, radius=1.5, std=0.3, num_classes=3)
NUM = 64


@pytest.fixture
def case():
    """Points and falling times t > s > r, and the exact flow map of each point's class."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM, 2, generator=generator, dtype=torch.float64)
    t, r, s = torch.rand(3, NUM, generator=generator, dtype=torch.float64)
    t = 0.1 + 0.9 * t
    r = r * t
    s = r + s * (t - r)
    condition = ClassCondition(torch.arange(NUM) % 3, 3)

    def jump(x, t, r):
        return MODES(x, t, condition, r=r)

    return x, t, s, r, MODES(x, t, condition), jump


def test_the_exact_map_is_its_own_target_for_any_exact_hop(case):
    x, t, s, r, _, jump = case
    torch.testing.assert_close(hop_target(x, t, s, r, jump(x, t, s), jump), jump(x, t, r), rtol=0, atol=1e-13)


def test_the_exact_map_is_its_own_target_in_the_limit(case):
    x, t, _, r, velocity, jump = case
    torch.testing.assert_close(limit_target(x, t, r, velocity, jump), jump(x, t, r), rtol=0, atol=1e-13)


def test_the_central_difference_agrees_with_the_derivative(case):
    x, t, _, r, velocity, jump = case
    torch.testing.assert_close(limit_target(x, t, r, velocity, jump, step=1e-5), jump(x, t, r), rtol=0, atol=1e-7)


def test_the_error_of_a_straight_hop_falls_with_the_square_of_its_length(case):
    """The hop is Euler's step: its error is of order h^2, and the jump after it carries it on."""
    x, t, _, r, velocity, jump = case

    def error(h):
        far = t - r > 0.1
        target = hop_target(x, t, (t - h).maximum(r), r, velocity, jump)
        return (target - jump(x, t, r))[far].abs().mean().item()

    assert abs(error(0.02) / error(0.01) - 4) < 0.2


def test_a_hop_to_the_same_time_asks_for_nothing_and_a_jump_of_no_length_for_the_velocity(case):
    x, t, _, r, velocity, jump = case
    torch.testing.assert_close(hop_target(x, t, t, r, velocity, jump), jump(x, t, r))
    assert torch.equal(hop_target(x, t, t, t, velocity, jump), velocity)
    assert torch.equal(limit_target(x, t, t, velocity, jump), velocity)


@pytest.mark.parametrize("method", ["hop", "jvp", "difference"])
def test_the_target_carries_no_gradient(case, method):
    """The network that jumps is the student itself; its gradient must come from the prediction alone."""
    x, t, s, r, velocity, jump = case
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def student(x, t, r):
        return scale * jump(x, t, r)

    if method == "hop":
        target = hop_target(x, t, s, r, scale * velocity, student)
    else:
        target = limit_target(x, t, r, velocity, student, None if method == "jvp" else 1e-4)
    assert not target.requires_grad
    wrong = 1.1 * jump(x, t, r)
    loss = (scale * wrong - target).square().mean()
    (gradient,) = torch.autograd.grad(loss, scale)
    torch.testing.assert_close(gradient, (2 * (wrong - target) * wrong).mean(), check_dtype=False)


def test_times_out_of_order_are_refused(case):
    x, t, _, r, velocity, jump = case
    with pytest.raises(ValueError, match="times must fall"):
        hop_target(x, r, t, r, velocity, jump)


def test_a_wild_tangent_is_scaled_down_and_a_small_one_kept_in_direction():
    prediction = torch.zeros(2, 3, 5)
    target = torch.stack([torch.full((3, 5), 1e4), torch.full((3, 5), 1e-3)])
    step = normalized_tangent(prediction, target) - prediction
    assert step[0].square().mean().sqrt() < 1
    torch.testing.assert_close(step[1], target[1] / 0.101)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_times_of_each_method_fall_and_have_the_shares_it_asks_for(name):
    settings = METHODS[name]
    t, s, r = sample_times(settings, 4000, torch.Generator().manual_seed(1))
    assert bool((r <= s).all() and (s <= t).all() and (t <= 1).all() and (r >= 0).all())
    assert abs((r == 0).double().mean().item() - settings.share_end) < 0.03
    assert abs((r == t).double().mean().item() - settings.share_same) < 0.03
    assert abs((t == 1).double().mean().item() - settings.share_noise) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_end": 0.9, "share_same": 0.3}, "shares must lie"),
        ({"hops": (8, 4)}, "hops must rise"),
        ({"velocity": "student"}, "hop must be 'half'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowMapSettings(**changes)


@pytest.fixture(scope="module")
def network():
    pipe = small_pipeline()
    teacher = velocity_model(pipe).eval()
    pipe.transformer = flow_map_transformer(pipe.transformer)
    pipe.register_to_config(flow_map=True)
    images = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = ImageData(images, torch.arange(12) % 10, tuple("abcdefghij"))
    return velocity_model(pipe).train(), Guided(teacher, 2.0), data


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_trains_the_network(network, name):
    student, teacher, data = network
    student.zero_grad()
    losses = FlowMapDistillation(student, teacher, data, METHODS[name]).losses(torch.Generator().manual_seed(3), 6)
    losses["loss"].backward()
    slot = student.transformer.time_guidance_embed.guidance_embedder.linear_2.weight
    assert torch.isfinite(losses["loss"]) and slot.grad.abs().max() > 0


def test_methods_meet_in_the_limit_of_small_hops():
    """A tiny hop asks for a tiny step from u, (t - s) / (t - r) of the one that the derivative asks for.

    In double precision: the embedding of time turns once in 0.006, so the hop has to be far smaller than that.
    """
    pipe = small_pipeline()
    teacher = Guided(velocity_model(pipe).double().eval(), 2.0)
    pipe.transformer = flow_map_transformer(pipe.transformer)
    pipe.register_to_config(flow_map=True)
    student = velocity_model(pipe).double()
    x_t = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t, r = torch.full((6,), 0.7, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64)
    condition = ClassCondition(torch.arange(6), 10)
    with torch.no_grad():
        u = student(x_t, t, condition, r=r)
    by_hop, by_jvp = (
        FlowMapDistillation(student, teacher, None, FlowMapSettings(hop=hop)).target(
            x_t, t, t - 2e-5, r, condition, x_t
        )
        - u
        for hop in ("random", "jvp")
    )
    assert (by_hop * (0.5 / 2e-5) - by_jvp).abs().mean() < 0.02 * by_jvp.abs().mean()
