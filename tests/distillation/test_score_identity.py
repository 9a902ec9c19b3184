"""SiD: by hand, against the exact gradient of the Fisher divergence, and where its gradients go."""

import pytest
import torch
from distillation.planes import fresh_head, points_of, quadrature, toy

from diffusion_opt.distillation.distribution import GanSettings, ScoreIdentity, score_identity_loss
from diffusion_opt.distillation.distribution.dmd import mean_distance
from diffusion_opt.flow import GaussianMixtureVelocity, clean_from_velocity, interpolate
from diffusion_opt.models import PointVelocity

RING = GaussianMixtureVelocity.ring(num_modes=3)
TIME = 0.4


def test_by_hand() -> None:
    """Gap (1/2, -1), teacher minus picture (1, -2), w = 1 / 1.5."""
    x, teacher_x, fake_x = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[1.5, 1.0]])
    assert score_identity_loss(x, teacher_x, fake_x, alpha=1.0).item() == pytest.approx((0.25 + 1.0) / 2 / 1.5)
    assert score_identity_loss(x, teacher_x, fake_x, alpha=0.0).item() == pytest.approx((0.5 + 2.0) / 2 / 1.5)
    assert score_identity_loss(x, teacher_x, fake_x, alpha=2.0).item() == pytest.approx(0.0, abs=1e-7)
    assert score_identity_loss(x, teacher_x, teacher_x, alpha=1.2).item() == 0


def law(mean: torch.Tensor, std: torch.Tensor) -> GaussianMixtureVelocity:
    return GaussianMixtureVelocity(torch.ones(1), mean.reshape(1, 1), std.reshape(1, 1))


def gradients(alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """In m and s of a student x = m + s z: of SiD's loss without its weight and with an exact but held fake score; and
    of E|x_T - x_phi|^2 with the fake score moving along. Expectations by quadrature, exact."""
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.6))
    z, e, weights = quadrature()
    x = (mean + std * z)[:, None]
    t = torch.full((len(x),), TIME, dtype=torch.float64)
    x_t = interpolate(x, e[:, None], t)
    teacher = law(torch.tensor(-0.4, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64))
    teacher_x = clean_from_velocity(x_t, teacher(x_t, t), t)
    held, moving = (
        clean_from_velocity(x_t, model(x_t, t), t) for model in (law(mean.detach(), std.detach()), law(mean, std))
    )
    unweight = weights * mean_distance(x, teacher_x).detach()
    rows = zip(x[:, None], teacher_x[:, None], held[:, None], unweight, strict=True)
    loss = sum(part * score_identity_loss(*row, alpha=alpha) for *row, part in rows)
    divergence = (weights * (teacher_x - moving)[:, 0].square()).sum()
    ours = torch.autograd.grad(loss, (mean, std), retain_graph=True)
    return torch.stack(ours), torch.stack(torch.autograd.grad(divergence, (mean, std)))


def test_alpha_one_half_gives_half_the_gradient_of_the_fisher_divergence() -> None:
    ours, exact = gradients(0.5)
    torch.testing.assert_close(ours, exact / 2, rtol=1e-9, atol=0)
    biased, _ = gradients(1.2)
    assert (biased - exact / 2)[1].abs() > 0.01  # in the deviation


def test_a_shift_by_hand() -> None:
    """With equal deviations x_T - x_phi = d c for a shift d, c = t^2 / V, and the gradient in m is -d c^2."""
    std = torch.tensor(0.6, dtype=torch.float64)
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    z, e, weights = quadrature()
    x = (mean + std * z)[:, None]
    t = torch.full((len(x),), TIME, dtype=torch.float64)
    x_t = interpolate(x, e[:, None], t)
    teacher_x, fake_x = (
        clean_from_velocity(x_t, law(torch.tensor(m, dtype=torch.float64), std)(x_t, t), t) for m in (-0.4, 0.7)
    )
    rows = zip(x[:, None], teacher_x[:, None], fake_x[:, None], strict=True)
    parts = torch.stack([score_identity_loss(*row, alpha=1.0) for row in rows])
    loss = (weights * mean_distance(x, teacher_x).detach() * parts).sum()
    (gradient,) = torch.autograd.grad(loss, mean)
    c = TIME**2 / ((1 - TIME) ** 2 * 0.6**2 + TIME**2)
    assert gradient.item() == pytest.approx(1.1 * c**2, rel=1e-6)


def test_the_gradient_runs_through_both_networks_and_into_neither() -> None:
    method = toy(ScoreIdentity, RING)
    with torch.no_grad():
        method.fake_score.layers[-1].weight.normal_(std=0.3)
    seen = {}

    def watch(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["fake"] = output.requires_grad

    method.fake_score.register_forward_hook(watch)
    losses = method.losses(torch.Generator().manual_seed(0), 16, "student")
    losses["loss"].backward()
    assert seen["fake"]
    assert all(weight.grad is None and weight.requires_grad for weight in method.fake_score.parameters())
    assert method.student.layers[-1].bias.grad.abs().max() > 0
    assert not losses["lag"].requires_grad


def test_no_loss_when_teacher_and_fake_score_agree() -> None:
    network = PointVelocity(width=32)
    method = toy(ScoreIdentity, network)
    method.fake_score = network
    assert method.losses(torch.Generator().manual_seed(0), 16, "student")["loss"].item() == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="has a divergence of its own, got 'kl'"):
        toy(ScoreIdentity, RING, head=fresh_head(), data=points_of(RING, 8), divergence="kl")
    with pytest.raises(ValueError, match="alpha must not be negative, got -1"):
        toy(ScoreIdentity, RING, alpha=-1.0)


def test_with_a_head_the_loss_is_that_of_sid_and_of_the_generator() -> None:
    """SiDA: the same batch with weight 0 is SiD, bit for bit; the critic sees real pictures."""
    gan = GanSettings(student_weight=0.5)
    plain = toy(ScoreIdentity, RING)
    with_head = toy(ScoreIdentity, RING, head=fresh_head(), data=points_of(RING, 8), gan=gan)
    losses = [method.losses(torch.Generator().manual_seed(0), 16, "student") for method in (plain, with_head)]
    assert losses[1]["identity"] == losses[0]["loss"].detach()
    torch.testing.assert_close(losses[1]["loss"], losses[0]["loss"] + 0.5 * losses[1]["gan"])
    losses[1]["loss"].backward()
    assert all(p.grad is None for p in with_head.fake_score.parameters()) and with_head.student.parameters()
    assert {"matching", "loss"} <= with_head.losses(torch.Generator().manual_seed(0), 16, "fake_score").keys()
