"""The flow-map identity against the exact flow map of a Gaussian, and its methods on the small network."""

import copy
import dataclasses

import pytest
import torch
from small_pipelines import small_pipeline
from torch import nn

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory.flow_map import (
    hop_target,
    limit_target,
    normalized_tangent,
    own_guidance,
    ratio_times,
)
from diffusion_opt.distillation.trajectory.flow_map_distillation import (
    METHODS,
    FlowMapDistillation,
    FlowMapSettings,
    sample_times,
)
from diffusion_opt.distillation.trajectory.metrics import adaptive_loss, pseudo_huber
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided, heun
from diffusion_opt.models import PointVelocity, flow_map_transformer, velocity_model

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
        ({"velocity": "student", "hop": "half", "share_end": 1.0, "share_same": 0.0}, "share_end must be below 1"),
        ({"warmup": 1.5}, "warmup in"),
        ({"guidance": (1.0, 3.0)}, "one slot"),
        ({"guidance": (3.0, 1.0), "share_end": 1.0, "share_same": 0.0}, "must rise"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowMapSettings(**changes)


def data_of(num: int = 12) -> ImageData:
    images = torch.rand(num, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageData(images, torch.arange(num) % 10, tuple("abcdefghij"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_trains_the_network_it_asks_for(name):
    settings, pipe = METHODS[name], small_pipeline()
    velocity = velocity_model(pipe).eval()
    teacher = velocity if settings.guidance else Guided(velocity, 2.0)
    if settings.two_time or settings.guidance:
        pipe.transformer = flow_map_transformer(pipe.transformer)
        pipe.register_to_config(flow_map=settings.two_time, guidance_range=settings.guidance)
    student = copy.deepcopy(velocity_model(pipe)).train()
    distiller = FlowMapDistillation(student, teacher, data_of(), settings)
    distiller.progress(1.0)
    losses = distiller.losses(torch.Generator().manual_seed(3), 6)
    losses["loss"].backward()
    embedding = student.transformer.time_guidance_embed
    part = embedding.guidance_embedder if settings.two_time or settings.guidance else embedding.timestep_embedder
    assert torch.isfinite(losses["loss"]) and part.linear_2.weight.grad.abs().max() > 0


def test_a_network_that_does_not_fit_the_method_is_refused():
    with pytest.raises(ValueError, match="use a two-time network"):
        FlowMapDistillation(PointVelocity(), MODES, None)
    with pytest.raises(ValueError, match="a scale and no second time"):
        FlowMapDistillation(PointVelocity(two_time=True), MODES, None, METHODS["lcm"])


class ExactMap(nn.Module):
    """The exact flow map of each class's Gaussian, with a trainable offset; without r it jumps to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, condition=None, r=None, guidance=None):
        return MODES(x_t, t, condition, r=torch.zeros_like(t) if r is None else r) + self.offset


LABELS = torch.arange(2048) % 3
POINTS = ImageData(
    MODES.sample(2048, torch.Generator().manual_seed(8), ClassCondition(LABELS, 3)), LABELS, ("a", "b", "c")
)
SHORT = {"random": {"hops": (2000, 2000)}}


def on_points(name: str, **changes) -> FlowMapDistillation:
    """A method on the closed-form teacher, unguided, its hops so short that their error cannot be seen."""
    settings = METHODS[name]
    if settings.guidance:
        changes |= {"guidance": (1.0, 1.0)}
    settings = dataclasses.replace(settings, **SHORT.get(settings.hop, {}), **changes)
    return FlowMapDistillation(ExactMap(), MODES, POINTS, settings)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"mean_flow_data", "consistency_training"}))
def test_the_loss_is_zero_at_the_exact_map_and_its_gradient_points_there(name):
    distiller = on_points(name)
    distiller.progress(1.0)
    assert distiller.losses(torch.Generator().manual_seed(0), 512)["squared_error"] < 5e-6
    offset = distiller.student.offset
    with torch.no_grad():
        offset.copy_(torch.tensor([0.3, -0.2]))
    distiller.losses(torch.Generator().manual_seed(0), 512)["loss"].backward()
    assert nn.functional.cosine_similarity(offset.grad, offset.detach(), dim=0) > 0.95
    assert (offset - 1e-3 * offset.grad / offset.grad.norm()).norm() < offset.norm()


@pytest.mark.parametrize("name", ["mean_flow_data", "consistency_training"])
def test_from_data_the_gradient_of_the_squared_error_is_zero_on_average(name):
    """A single target is noisy, its mean is the exact map: the gradient stays within four standard errors of 0."""
    changes = {"hop": "random", "hops": (500, 500)} if name == "consistency_training" else {}
    distiller = on_points(name, distance="squared", **changes)
    gradients = []
    for seed in range(24):
        distiller.student.zero_grad()
        distiller.losses(torch.Generator().manual_seed(seed), 512)["loss"].backward()
        gradients.append(distiller.student.offset.grad.clone())
    gradients = torch.stack(gradients)
    assert bool((gradients.mean(0).abs() < 4 * gradients.std(0) / 24**0.5).all())
    with torch.no_grad():
        distiller.student.offset.copy_(torch.tensor([0.3, -0.2]))
    distiller.student.zero_grad()
    distiller.losses(torch.Generator().manual_seed(0), 2048)["loss"].backward()
    assert distiller.student.offset.grad @ distiller.student.offset.detach() > 0


def test_consistency_distillation_is_that_of_the_paper_and_its_gradient_too():
    """|f(x_t, t) - sg f(x_s, s)| / t, f = x - t u, with x_s by one Euler step of the teacher, written out here."""
    settings = dataclasses.replace(METHODS["consistency"], hops=(8, 8), distance="squared", share_noise=0.5)
    student = PointVelocity(num_classes=3)
    nn.init.normal_(student.layers[-1].weight, std=0.3)
    distiller = FlowMapDistillation(student, MODES, POINTS, settings)
    distiller.losses(torch.Generator().manual_seed(0), 64)["loss"].backward()
    found = [p.grad.clone() for p in student.parameters()]

    def by_hand(stop: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(len(POINTS), (64,), generator=generator)
        noise = torch.randn(64, 2, generator=generator)
        t, s, _ = sample_times(settings, 64, generator)
        t, s, condition = t[:, None], s[:, None], ClassCondition(LABELS[index], 3)
        x_t = (1 - t) * POINTS.images[index] + t * noise
        x_s = x_t - (t - s) * MODES(x_t, t[:, 0], condition)
        end = x_s - s * student(x_s, s[:, 0], condition)
        start = x_t - t * student(x_t, t[:, 0], condition)
        error = (start - (end.detach() if stop else end)) / t
        return list(torch.autograd.grad(error.square().sum(1).mean(), list(student.parameters())))

    for mine, theirs in zip(found, by_hand(stop=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(found, by_hand(stop=False), strict=True))


def test_for_a_mixture_solved_finely_the_limit_holds_as_well():
    mixture = GaussianMixtureVelocity.ring(num_modes=3, radius=1.0, std=0.4)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, r = torch.full((16,), 0.8, dtype=torch.float64), torch.full((16,), 0.1, dtype=torch.float64)

    def jump(x, t, r):
        grid = torch.linspace(float(t[0]), float(r[0]), 61, dtype=torch.float64)
        return (x - heun(mixture, x, grid)) / (t - r)[:, None]

    target = limit_target(x, t, r, mixture(x, t), jump, step=1e-3)
    torch.testing.assert_close(
        target, jump(x, t, r), rtol=0, atol=1e-3
    )  # both solver and difference are of second order


def test_tangents_come_in_over_the_warm_up():
    distiller = on_points("scm", normalize=False, warmup=0.5, share_noise=0.0)
    x, t = torch.randn(8, 2), torch.full((8,), 0.6)
    zero, condition = torch.zeros(8), ClassCondition(torch.arange(8) % 3, 3)
    velocity, exact = MODES(x, t, condition), MODES(x, t, condition, r=zero)
    for share, part in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        distiller.progress(share)
        target = distiller.target(x, t, t, zero, condition, velocity)
        torch.testing.assert_close(target, velocity + part * (exact - velocity), rtol=0, atol=1e-5)


def test_ratios_halve_the_hop_with_each_doubling():
    t = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    hops = [t - ratio_times(t, k) for k in (3, 4, 5)]
    torch.testing.assert_close(hops[0], 2 * hops[1])
    torch.testing.assert_close(hops[1], 2 * hops[2])
    assert hops[0][2] == 1 / 16  # n(1) = 1
    assert (ratio_times(t[:2], 0) == 0).all()
    settings = METHODS["consistency_training"]
    late = [sample_times(settings, 50, torch.Generator().manual_seed(0), share)[1] for share in (0.0, 0.99, 1.0)]
    assert (late[0] < late[1]).all() and torch.equal(late[1], late[2])


def test_two_ways_to_weigh_errors_meet_at_power_one_half():
    error = torch.randn(7, 5, requires_grad=True)
    c = 0.03 * 5**0.5
    (adaptive,) = torch.autograd.grad(adaptive_loss(error, power=0.5, c=c**2).sum(), error)
    (huber,) = torch.autograd.grad(pseudo_huber(error).sum(), error)
    torch.testing.assert_close(adaptive, 2 * huber)
    torch.testing.assert_close(adaptive_loss(error, power=0.0), error.square().sum(1))


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


def test_a_student_that_has_learned_own_guidance_is_the_guided_teacher():
    """Its u(t, t | c) is guided itself: V = w v + k V + (1 - w - k) u has the solution V = u + w / (1 - k) (v - u)."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(9, 2, generator=generator), torch.rand(9, generator=generator)
    condition = ClassCondition(torch.arange(9) % 3, 3)
    conditional, unconditional = MODES(x, t, condition), MODES(x, t, condition.drop())
    expected = Guided(MODES, 2.5)(x, t, condition)
    for mixing in (0.0, 0.3, 0.9):
        found = own_guidance(conditional, expected, unconditional, torch.full((9,), 2.5), mixing)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_own_guidance_by_hand_and_off():
    """Scale 2, mixing 1/2: w = 1, so v + u_c / 2 - u / 2; scale 1 without mixing is v, bit for bit."""
    v, c, u = torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert own_guidance(v, c, u, torch.tensor([2.0]), 0.5).item() == 3.5
    assert own_guidance(v, c, u, torch.ones(1)).item() == 3.0


def test_the_first_hop_of_ratio_times_is_longer_than_the_papers():
    """From t = 0.9, sigma = 9: the paper halves sigma, so its hop ends at t = 0.82; ours halves t."""
    t = torch.tensor([0.9], dtype=torch.float64)
    assert ratio_times(t, 0).item() == pytest.approx(0.45, abs=1e-3)
    sigma = 9.0 * (1 - (1 + 8 * torch.sigmoid(torch.tensor(-9.0)).item()) / 2)
    assert sigma / (1 + sigma) == pytest.approx(0.818, abs=1e-3)


def test_a_student_of_the_data_may_guide_itself():
    """Off it is the plain method bit for bit; on, dropped samples have the plain velocity and no condition."""
    points = MODES.sample(64, torch.Generator().manual_seed(0))
    data = ImageData(points, torch.arange(64) % 3, ("a", "b", "c"))
    student = PointVelocity(num_classes=3, width=16, two_time=True)
    base = dataclasses.replace(METHODS["mean_flow_data"], hop="difference")
    plain, off, on, dropped = (
        FlowMapDistillation(student, None, data, dataclasses.replace(base, **changes))
        for changes in ({}, {"own_drop": 0.5}, {"own_guidance": 2.0}, {"own_guidance": 2.0, "own_drop": 0.999})
    )
    losses = [method.losses(torch.Generator().manual_seed(1), 32)["loss"] for method in (plain, off, on)]
    assert losses[0] == losses[1] and losses[0] != losses[2]
    x, t = points[:32], torch.rand(32, generator=torch.Generator().manual_seed(2))
    condition = ClassCondition(torch.arange(32) % 3, 3)
    velocity, condition = dropped.guided_by_itself(x, t, condition, x, torch.Generator().manual_seed(3))
    assert torch.equal(velocity, x)
    interval = dataclasses.replace(base, own_guidance=2.0, own_drop=0.0, own_interval=(0.5, 1.0))
    method = FlowMapDistillation(student, None, data, interval)
    guided, _ = method.guided_by_itself(x, t, ClassCondition(torch.arange(32) % 3, 3), x, torch.Generator())
    changed = (guided != x).any(1)
    assert torch.equal(changed, t >= 0.5)
    for wrong in ({"velocity": "teacher"}, {"share_end": 1.0, "share_same": 0.0}):
        with pytest.raises(ValueError, match="own_guidance is for two-time students of the data"):
            dataclasses.replace(base, own_guidance=2.0, **wrong)
