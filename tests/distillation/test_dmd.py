"""Distribution matching: its gradient is that of the analytic KL divergence, and its losses are modelopt's."""

import copy
from pathlib import Path

import pytest
import torch
from distillation.planes import fresh_head, points_of, quadrature, toy

from diffusion_opt.distillation.distribution import (
    DistributionMatching,
    GanSettings,
    approximate_r1,
    discriminator_loss,
    dmd_gradient,
    dmd_loss,
    fake_score_loss,
    generator_loss,
)
from diffusion_opt.distillation.distribution.dmd import mean_distance
from diffusion_opt.flow import GaussianMixtureVelocity, clean_from_velocity, expand_time, interpolate
from diffusion_opt.models import PointVelocity
from diffusion_opt.training import TrainConfig, train

RING = GaussianMixtureVelocity.ring(num_modes=3)


def clean_predictions(*shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(*shape, generator=generator) for _ in range(4))


def test_gradient_of_the_loss_is_the_gradient() -> None:
    x, teacher_x, fake_x, _ = clean_predictions(2, 3, 5, 7)
    x.requires_grad_()
    dmd_loss(x, teacher_x, fake_x).backward()
    assert torch.allclose(x.grad, dmd_gradient(x.detach(), teacher_x, fake_x) / x.numel(), atol=1e-7)
    weighted = x.detach().clone().requires_grad_()
    dmd_loss(weighted, teacher_x, fake_x, torch.tensor([0.0, 3.0])).backward()
    assert weighted.grad[0].abs().max() == 0
    assert torch.allclose(weighted.grad[1], 3 * x.grad[1])


def test_gradient_is_the_difference_of_scores() -> None:
    """x_phi - x_T = t^2 / (1 - t) (s_phi - s_T), up to the weight."""
    teacher, fake = (GaussianMixtureVelocity.ring(num_modes=5, radius=r, std=0.3) for r in (1.0, 1.4))
    generator = torch.Generator().manual_seed(0)
    x, t = fake.sample(64, generator), torch.rand(64, generator=generator) * 0.9 + 0.05
    x_t = interpolate(x, torch.randn(64, 2, generator=generator), t)
    teacher_x, fake_x = (clean_from_velocity(x_t, model(x_t, t), t) for model in (teacher, fake))
    scores = fake.score(x_t, t) - teacher.score(x_t, t)
    analytic = expand_time(t**2 / (1 - t), x_t) * scores
    weight = 1 / (x - teacher_x).abs().mean(1, keepdim=True)
    assert torch.allclose(dmd_gradient(x, teacher_x, fake_x), weight * analytic, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("time", [0.2, 0.5, 0.9])
def test_a_gaussian_student_gets_the_gradient_of_the_closed_form_kl(time: float) -> None:
    """x = m + s z, all expectations exact by quadrature, so the two agree to rounding; the weight is taken out."""
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.6))
    z, e, weights = quadrature()
    x = (mean + std * z)[:, None]
    t = torch.full((len(x),), time, dtype=torch.float64)
    x_t = interpolate(x, e[:, None], t).detach()
    models = (
        GaussianMixtureVelocity(torch.ones(1), torch.tensor([[m]]), torch.tensor([[s]]))
        for m, s in ((-0.4, 1.1), (0.7, 0.6))
    )
    teacher_x, fake_x = (clean_from_velocity(x_t, model(x_t, t), t) for model in models)
    unweighted = dmd_gradient(x.detach(), teacher_x, fake_x) * mean_distance(x.detach(), teacher_x)[:, None]
    ours = torch.autograd.grad((weights[:, None] * unweighted * x).sum(), (mean, std))

    variance, other = (1 - time) ** 2 * std**2 + time**2, (1 - time) ** 2 * 1.1**2 + time**2
    apart = (1 - time) * (mean + 0.4)
    kl = 0.5 * (variance / other + apart**2 / other - 1 - (variance / other).log())
    exact = torch.autograd.grad(time**2 / (1 - time) ** 2 * kl, (mean, std))
    torch.testing.assert_close(torch.stack(ours), torch.stack(exact), rtol=1e-5, atol=0)  # means and stds are float32


def test_a_mixture_student_gets_the_gradient_of_kl_within_the_monte_carlo_error() -> None:
    """x = a y + b with y on a ring: against differences of KL on the same 20 000 points, within 4 standard errors."""
    time, num, step = 0.4, 20_000, 1e-4
    teacher = GaussianMixtureVelocity.ring(num_modes=8, radius=1.6, std=0.3)
    base = GaussianMixtureVelocity.ring(num_modes=8, radius=1.0, std=0.25)
    generator = torch.Generator().manual_seed(3)
    y, e = base.sample(num, generator).double(), torch.randn(num, 2, generator=generator, dtype=torch.float64)
    t = torch.full((num,), time, dtype=torch.float64)

    def student(scale: float, shift: float) -> tuple[torch.Tensor, GaussianMixtureVelocity]:
        moved = torch.tensor([shift, 0.0], dtype=torch.float64)
        return scale * y + moved, GaussianMixtureVelocity(base.weights, scale * base.means + moved, scale * base.stds)

    def log_ratio(scale: float, shift: float) -> torch.Tensor:
        x, law = student(scale, shift)
        x_t = interpolate(x, e, t)
        return law.log_density(x_t, t) - teacher.log_density(x_t, t)

    x, law = student(1.2, 0.3)
    x_t = interpolate(x, e, t)
    teacher_x, fake_x = (clean_from_velocity(x_t, model(x_t, t), t) for model in (teacher, law))
    unweighted = dmd_gradient(x, teacher_x, fake_x) * mean_distance(x, teacher_x)[:, None]
    for scale, shift, ours in ((step, 0.0, (unweighted * y).sum(1)), (0.0, step, unweighted[:, 0])):
        kl = (log_ratio(1.2 + scale, 0.3 + shift) - log_ratio(1.2 - scale, 0.3 - shift)) / (2 * step)
        difference = ours * (1 - time) ** 2 / time**2 - kl
        assert ours.mean().abs() > 0.02
        assert difference.mean().abs() < 4 * difference.std() / num**0.5


@pytest.mark.slow
def test_losses_are_modelopt_s_number_for_number() -> None:
    from modelopt.torch.fastgen import losses as theirs

    x, teacher_x, fake_x, noise = clean_predictions(2, 3, 5, 7)
    assert torch.allclose(dmd_loss(x, teacher_x, fake_x), theirs.vsd_loss(x, teacher_x, fake_x), rtol=1e-5)
    scale = torch.tensor([0.3, 1.9])
    their_vsd = theirs.vsd_loss(x, teacher_x, fake_x, additional_scale=scale)
    assert torch.allclose(dmd_loss(x, teacher_x, fake_x, scale), their_vsd, rtol=1e-5)
    velocity = teacher_x
    their_loss = theirs.dsm_loss(pred_type="flow", net_pred=velocity, x0=x, eps=noise, t=torch.tensor([0.3, 0.8]))
    assert torch.allclose(fake_score_loss(velocity, x, noise), their_loss, rtol=1e-5)
    real, fake = torch.randn(2, 6, 3) * 4
    assert torch.equal(generator_loss(fake), theirs.gan_gen_loss(fake))
    assert torch.equal(discriminator_loss(real, fake), theirs.gan_disc_loss(real, fake))
    assert torch.allclose(approximate_r1(real, fake), theirs.r1_loss(real, fake), rtol=1e-6)


def test_no_gradient_when_all_three_agree() -> None:
    x, same, _, _ = clean_predictions(2, 3, 5, 7)
    assert dmd_gradient(x, same, same).abs().max() == 0


def test_turns_and_roles() -> None:
    method = toy(DistributionMatching, RING, fake_updates=2, warmup=100)
    turns = [method.turn(step) for step in range(99, 107)]
    assert turns == ["fake_score", "student", *["fake_score"] * 2, "student", *["fake_score"] * 2, "student"]
    assert list(method.roles) == ["student", "fake_score"]


@pytest.mark.parametrize("head", [False, True])
def test_each_turn_trains_its_own_network_and_resume_is_exact(tmp_path: Path, head: bool) -> None:
    def method() -> DistributionMatching:
        gan = {"head": fresh_head(), "data": points_of(RING, 64)} if head else {}
        return toy(DistributionMatching, RING, fake_updates=1, warmup=3, **gan)

    def run(out: Path, steps: int, method: DistributionMatching) -> None:
        train(method, TrainConfig(steps=steps, batch_size=8, warmup_steps=1, decay_fraction=1e-9), out, progress=False)

    whole, warm = method(), method()
    before = copy.deepcopy(warm.student.state_dict())
    run(tmp_path / "warm", 3, warm)
    assert all(torch.equal(before[name], value) for name, value in warm.student.state_dict().items())
    run(tmp_path / "whole", 9, whole)
    run(tmp_path / "parts", 5, method())
    resumed = method()
    run(tmp_path / "parts", 9, resumed)
    for name in ("student", "fake_score", "head") if head else ("student", "fake_score"):
        one, two = getattr(whole, name).state_dict(), getattr(resumed, name).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(before["layers.6.weight"], resumed.student.state_dict()["layers.6.weight"])


def test_the_student_s_turn_leaves_no_gradient_in_the_critic() -> None:
    """The trainer clears the gradients of the role whose turn it is, so any left here would join the next step."""
    method = toy(DistributionMatching, RING, head=fresh_head(), data=points_of(RING, 64), divergence="js")
    losses = method.losses(torch.Generator().manual_seed(0), 16, "student")
    losses["loss"].backward()
    assert all(
        weight.grad is None and weight.requires_grad for weight in method.roles["fake_score"].network.parameters()
    )
    assert method.student.layers[-1].bias.grad.abs().max() > 0
    assert {"loss", "gan", "lag", "gap", "weight_low", "weight_high"} == losses.keys()
    assert losses["weight_low"] <= 1 <= losses["weight_high"]


def test_the_head_s_pull_reaches_the_student() -> None:
    """With all three networks equal the matching gradient is 0; what is left is the GAN term, in its weight."""

    def gradient(weight: float) -> torch.Tensor:
        network = PointVelocity(width=32)
        method = toy(
            DistributionMatching, network, head=fresh_head(), data=points_of(RING, 64), gan=GanSettings(weight, 1.0)
        )
        method.fake_score = network
        method.losses(torch.Generator().manual_seed(0), 16, "student")["loss"].backward()
        return method.student.layers[-1].bias.grad

    assert gradient(0.0).abs().max() == 0
    torch.testing.assert_close(gradient(0.2), 2 * gradient(0.1))
    assert gradient(0.1).abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "kl needs the ratio of densities"),
        ({"divergence": "wasserstein"}, "divergence must be one of reverse_kl, kl, .*, got 'wasserstein'"),
        ({"head": True}, "the GAN head needs real pictures"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    options = options | ({"head": fresh_head()} if "head" in options else {})
    with pytest.raises(ValueError, match=message):
        toy(DistributionMatching, RING, **options)
