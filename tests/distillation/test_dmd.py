"""Distribution matching: its gradient is the analytic one, its losses are modelopt's, and it recovers all modes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_opt.distillation.distribution import DistributionMatching, dmd_gradient, dmd_loss, fake_score_loss
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, clean_from_velocity, expand_time, interpolate
from diffusion_opt.training import TrainConfig, train


def clean_predictions(*shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(*shape, generator=generator) for _ in range(4))


def test_gradient_of_the_loss_is_the_gradient() -> None:
    x, teacher_x, fake_x, _ = clean_predictions(2, 3, 5, 7)
    x.requires_grad_()
    dmd_loss(x, teacher_x, fake_x).backward()
    assert torch.allclose(x.grad, dmd_gradient(x.detach(), teacher_x, fake_x) / x.numel(), atol=1e-7)


def test_gradient_is_the_difference_of_scores() -> None:
    """x_phi - x_T = t^2 / (1 - t) (s_phi - s_T): the reverse KL gradient of two known mixtures, up to the weight."""
    teacher, fake = (GaussianMixtureVelocity.ring(num_modes=5, radius=r, std=0.3) for r in (1.0, 1.4))
    generator = torch.Generator().manual_seed(0)
    x, t = fake.sample(64, generator), torch.rand(64, generator=generator) * 0.9 + 0.05
    x_t = interpolate(x, torch.randn(64, 2, generator=generator), t)
    teacher_x, fake_x = (clean_from_velocity(x_t, model(x_t, t), t) for model in (teacher, fake))
    scores = fake.score(x_t, t) - teacher.score(x_t, t)
    analytic = expand_time(t**2 / (1 - t), x_t) * scores
    weight = 1 / (x - teacher_x).abs().mean(1, keepdim=True)
    assert torch.allclose(dmd_gradient(x, teacher_x, fake_x), weight * analytic, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_losses_are_modelopt_s_number_for_number() -> None:
    from modelopt.torch.fastgen import losses as theirs

    x, teacher_x, fake_x, noise = clean_predictions(2, 3, 5, 7)
    assert torch.allclose(dmd_loss(x, teacher_x, fake_x), theirs.vsd_loss(x, teacher_x, fake_x), rtol=1e-5)
    velocity = teacher_x
    their_loss = theirs.dsm_loss(pred_type="flow", net_pred=velocity, x0=x, eps=noise, t=torch.tensor([0.3, 0.8]))
    assert torch.allclose(fake_score_loss(velocity, x, noise), their_loss, rtol=1e-5)


def test_no_gradient_when_all_three_agree() -> None:
    x, same, _, _ = clean_predictions(2, 3, 5, 7)
    assert dmd_gradient(x, same, same).abs().max() == 0


class _Net(nn.Module):
    """A velocity in the plane that starts as the zero function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x_t, t, condition=None, r=None):
        wave = torch.stack([(3 * t).sin(), (3 * t).cos()], dim=1)
        return self.net(torch.cat([x_t, wave], dim=1))


def distiller(teacher: GaussianMixtureVelocity, fake_updates: int) -> DistributionMatching:
    return DistributionMatching(
        _Net(), _Net(), lambda x_t, t, condition: teacher(x_t, t), (2,), 1, fake_updates=fake_updates, warmup=100
    )


def modes_found(student: nn.Module, teacher: GaussianMixtureVelocity) -> int:
    """Modes that hold at least a quarter of their fair share of the student's samples, within three deviations."""
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = noise - student(noise, torch.ones(2000))
    near = torch.cdist(made, teacher.means.float()) < 3 * 0.25
    return int((near.float().mean(0) > 0.25 / len(teacher.means)).sum())


@pytest.mark.slow
def test_all_modes_are_recovered(tmp_path: Path) -> None:
    teacher = GaussianMixtureVelocity.ring(num_modes=6, radius=2.0, std=0.25)
    config = TrainConfig(steps=2500, batch_size=128, learning_rate=5e-4, ema_decay=0.98, betas=(0.0, 0.99))
    torch.manual_seed(0)
    fresh = train(distiller(teacher, 4), config, tmp_path / "fresh", progress=False)
    assert modes_found(fresh.ema, teacher) == 6


def test_turns_and_roles(tmp_path: Path) -> None:
    method = distiller(GaussianMixtureVelocity.ring(num_modes=3), 2)
    turns = [method.turn(step) for step in range(99, 107)]
    assert turns == ["fake_score", "student", *["fake_score"] * 2, "student", *["fake_score"] * 2, "student"]
    assert list(method.roles) == ["student", "fake_score"]


def test_each_turn_trains_its_own_network_and_resume_is_exact(tmp_path: Path) -> None:
    teacher = GaussianMixtureVelocity.ring(num_modes=3)

    def run(out: Path, steps: int, method: DistributionMatching) -> None:
        train(method, TrainConfig(steps=steps, batch_size=8, warmup_steps=1, decay_fraction=1e-9), out, progress=False)

    def method() -> DistributionMatching:
        torch.manual_seed(0)
        return DistributionMatching(
            _Net(), _Net(), lambda x_t, t, condition: teacher(x_t, t), (2,), 1, fake_updates=1, warmup=3
        )

    whole, warm = method(), method()
    before = copy.deepcopy(warm.student.state_dict())
    run(tmp_path / "warm", 3, warm)
    assert all(torch.equal(before[name], value) for name, value in warm.student.state_dict().items())
    run(tmp_path / "whole", 9, whole)
    run(tmp_path / "parts", 5, method())
    resumed = method()
    run(tmp_path / "parts", 9, resumed)
    for name in ("student", "fake_score"):
        one, two = getattr(whole, name).state_dict(), getattr(resumed, name).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(before["net.0.weight"], resumed.student.state_dict()["net.0.weight"])


def test_generated_pictures_carry_the_asked_class() -> None:
    method = distiller(GaussianMixtureVelocity.ring(num_modes=3), 2)
    x, condition = method.generate(torch.Generator().manual_seed(0), 7)
    assert x.shape == (7, 2)
    assert isinstance(condition, ClassCondition) and len(condition) == 7
