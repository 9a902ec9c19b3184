"""Distillation along stored trajectories: exact at the teacher's flow map, and it finds it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_opt.distillation.trajectory import OdeDistillation, OdePairs, pseudo_huber
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, expand_time
from diffusion_opt.subjects import Classes
from diffusion_opt.training import TrainConfig, step_generator, train

TIMES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.fixture(scope="module")
def teacher() -> GaussianMixtureVelocity:
    """One Gaussian a class: its flow map is known in closed form (`r=`)."""
    return GaussianMixtureVelocity(
        weights=torch.tensor([0.5, 0.5]),
        means=torch.tensor([[1.0, -2.0], [-1.5, 0.5]]),
        stds=torch.tensor([[0.5, 0.2], [0.3, 0.8]]),
        classes=torch.arange(2),
    )


@pytest.fixture(scope="module")
def pairs(teacher: GaussianMixtureVelocity) -> OdePairs:
    """Exact trajectories, by the closed-form flow map."""
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(512) % 2
    condition, ones = ClassCondition(labels, 2), torch.ones(512)
    states = [noise]
    for time in TIMES[1:]:
        r = torch.full((512,), float(time))
        jump = teacher(noise, ones, condition, r=r)
        states.append(noise - expand_time(ones - r, noise) * jump)
    return OdePairs(torch.stack(states, 1), labels, TIMES, Classes(2))


class _FlowMap(nn.Module):
    """The exact mean velocity of the jump from t to the next of `steps` rungs, with a trainable offset."""

    def __init__(self, teacher: GaussianMixtureVelocity, steps: int) -> None:
        super().__init__()
        self.teacher, self.steps = teacher, steps
        self.offset = nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, condition=None, r=None):
        return self.teacher(x_t, t, condition, r=(t - 1 / self.steps).clamp(min=0)) + self.offset


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_loss_is_zero_at_the_exact_flow_map(teacher: GaussianMixtureVelocity, pairs: OdePairs, steps: int) -> None:
    distiller = OdeDistillation(_FlowMap(teacher, steps), pairs, steps)
    losses = distiller.losses(step_generator(0, 0), 64)
    assert losses["loss"].item() < 1e-6
    assert losses["squared_error"].item() < 1e-10


def test_gradient_points_back_to_the_flow_map(teacher: GaussianMixtureVelocity, pairs: OdePairs) -> None:
    model = _FlowMap(teacher, 2)
    with torch.no_grad():
        model.offset.copy_(torch.tensor([0.3, -0.2]))
    OdeDistillation(model, pairs, 2).losses(step_generator(0, 0), 64)["loss"].backward()
    direction = nn.functional.cosine_similarity(model.offset.grad, model.offset, dim=0)
    assert direction.item() > 0.999


def test_wrong_step_count_for_the_jumps_is_seen(teacher: GaussianMixtureVelocity, pairs: OdePairs) -> None:
    losses = OdeDistillation(_FlowMap(teacher, 4), pairs, 1).losses(step_generator(0, 0), 64)
    assert losses["squared_error"].item() > 0.01


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x_t, t, condition=None, r=None):
        one_hot = nn.functional.one_hot(condition.labels, 2).float()
        return self.net(torch.cat([x_t, t[:, None], one_hot], dim=1))


def test_a_small_student_finds_the_distribution_in_one_step(
    teacher: GaussianMixtureVelocity, pairs: OdePairs, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = _Student()
    config = TrainConfig(steps=600, batch_size=128, learning_rate=5e-3, ema_decay=0.98)
    result = train(OdeDistillation(student, pairs, 1), config, tmp_path, progress=False)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(7))
    condition = ClassCondition(torch.arange(4000) % 2, 2)
    with torch.no_grad():
        made = noise - result.ema(noise, torch.ones(4000), condition)
    exact = noise - teacher(noise, torch.ones(4000), condition, r=torch.zeros(4000))
    assert (made - exact).norm(dim=1).mean() < 0.08  # the standard deviations are 0.2 … 0.8
    assert torch.allclose(made[::2].std(0), torch.tensor([0.5, 0.2]), atol=0.05)
    assert torch.allclose(made[1::2].mean(0), torch.tensor([-1.5, 0.5]), atol=0.05)


def test_steps_must_divide_the_rungs(teacher: GaussianMixtureVelocity, pairs: OdePairs) -> None:
    with pytest.raises(ValueError, match=r"divide the 4 rungs .*, got 3"):
        OdeDistillation(_FlowMap(teacher, 3), pairs, 3)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    c = 0.03 * 5**0.5
    small, large = torch.full((1, 5), 1e-4), torch.full((1, 5), 100.0)
    assert pseudo_huber(small).item() == pytest.approx(5e-8 / (2 * c), rel=0.02)
    assert pseudo_huber(large).item() == pytest.approx(100 * 5**0.5 - c, rel=1e-5)
    assert pseudo_huber(torch.zeros(2, 3)).tolist() == [0.0, 0.0]
