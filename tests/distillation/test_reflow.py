"""Reflow: times of the density it asks for, zero on straight paths, and one step exact where lines do not cross."""

import math

import pytest
import torch
from torch import nn

from diffusion_opt.distillation.trajectory import OdePairs, Reflow
from diffusion_opt.distillation.trajectory.reflow import reflow_loss, u_shaped_times
from diffusion_opt.subjects import Classes
from diffusion_opt.training import step_generator


def test_times_have_the_u_shaped_density():
    a, edges = 4.0, torch.linspace(0, 1, 11)
    t = u_shaped_times(100_000, torch.Generator().manual_seed(0), a)
    found = torch.histc(t, 10, 0, 1) / len(t)
    torch.testing.assert_close(found, _exact(edges, a), rtol=0.05, atol=0)
    assert 0 <= t.min() and t.max() <= 1
    with pytest.raises(ValueError, match="a must be positive"):
        u_shaped_times(3, torch.Generator(), 0.0)


def _exact(edges: torch.Tensor, a: float) -> torch.Tensor:
    """Integral over each bin of [exp(a t) + exp(a (1 - t))] a / (2 (exp(a) - 1))."""
    rising = torch.exp(a * edges)
    falling = -torch.exp(a * (1 - edges))
    return (rising + falling).diff() / (2 * math.expm1(a))


class _Straight(nn.Module):
    """The exact velocity where each noise e belongs to the picture a e + b: lines that never cross."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b, self.offset = a, b, nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, condition=None, r=None):
        t = t[:, None]
        noise = (x_t - (1 - t) * self.b) / ((1 - t) * self.a + t)
        return noise - (self.a * noise + self.b) + self.offset


@pytest.fixture
def pairs() -> OdePairs:
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    states = torch.stack([noise, torch.full_like(noise, 9.0), 0.5 * noise + 1.5], dim=1)  # the middle is not used
    return OdePairs(states, torch.arange(40) % 2, torch.tensor([1.0, 0.5, 0.0]), Classes(2))


def test_the_loss_is_zero_at_the_exact_velocity_and_its_gradient_points_there(pairs):
    student = _Straight(0.5, 1.5)
    assert Reflow(student, pairs).losses(step_generator(0, 0), 64)["squared_error"] < 1e-10
    with torch.no_grad():
        student.offset.copy_(torch.tensor([-0.1, 0.4]))
    Reflow(student, pairs).losses(step_generator(0, 0), 64)["loss"].backward()
    assert nn.functional.cosine_similarity(student.offset.grad, student.offset, dim=0) > 0.999


def test_the_loss_is_the_distance_to_the_line_of_the_pair():
    x, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -1.0]])
    c = 0.03 * math.sqrt(2)
    expected = math.sqrt(1 + 9 + c**2) - c
    assert reflow_loss(torch.zeros(1, 2), x, noise).item() == pytest.approx(expected, rel=1e-6)
