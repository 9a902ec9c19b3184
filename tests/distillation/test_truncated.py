"""The second stage of a consistency student: its times, its targets, and that it is the first stage in the limit."""

import pytest
import torch

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory import TruncatedConsistency, TruncatedSettings
from diffusion_opt.distillation.trajectory.flow_map import hop_target
from diffusion_opt.distillation.trajectory.metrics import pseudo_huber
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity
from diffusion_opt.models import PointVelocity

RING = GaussianMixtureVelocity.ring(num_modes=3, num_classes=3)


def stage(student: torch.nn.Module | None = None, **settings: object) -> TruncatedConsistency:
    points = RING.sample(30, torch.Generator().manual_seed(0))
    data = ImageData(points, torch.arange(30) % 3, ("a", "b", "c"))
    first = PointVelocity(num_classes=3, width=16, seed=1).requires_grad_(False)
    chosen = TruncatedSettings(**settings)
    student = student or PointVelocity(num_classes=3, width=16, seed=0)
    return TruncatedConsistency(student, RING, data, chosen.flow_map, first=first, truncated=chosen)


def test_times_lie_above_the_transition_and_their_share_at_it_is_that_of_the_boundary():
    method = stage(transition=0.4, boundary=0.25, share_noise=0.5)
    t, s, r = method.times(40_000, torch.Generator().manual_seed(0))
    assert (t >= 0.4).all() and (s < t).all() and (s >= 0).all() and (r == 0).all()
    assert (t == 0.4).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (t == 1).float().mean() == pytest.approx(0.5 * 0.75, abs=0.01)
    length = (t - s)[s > 0]
    assert length.min() >= 1 / 32 - 1e-6 and length.max() <= 1 / 4 + 1e-6


def test_the_target_ends_by_whoever_answers_there_and_is_the_first_stage_at_the_boundary():
    method, generator = stage(transition=0.5), torch.Generator().manual_seed(0)
    x, condition = torch.randn(4, 2, generator=generator), ClassCondition(torch.tensor([0, 1, 2, 0]), 3)
    t, s = torch.tensor([0.9, 0.6, 0.5, 1.0]), torch.tensor([0.7, 0.4, 0.3, 0.5])
    velocity = RING(x, t, condition)
    ends = {net: lambda x, at, to, net=net: net(x, at, condition) for net in (method.student, method.first)}
    by = {net: hop_target(x, t, s, torch.zeros(4), velocity, end) for net, end in ends.items()}
    found = method.target(x, t, s, torch.zeros(4), condition, torch.zeros_like(x))
    at_cut = method.first(x, t, condition)
    expected = torch.stack([by[method.student][0], by[method.first][1], at_cut[2], by[method.student][3]])
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


def test_the_loss_is_the_mean_above_the_boundary_and_a_share_of_that_at_it():
    method = stage(transition=0.5, boundary_weight=0.1)
    each, t = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([0.7, 1.0, 0.5, 0.5])
    assert method.reduce(each, t).item() == pytest.approx(2.0 + 0.1 * 15.0)
    assert method.reduce(each[:2], t[:2]).item() == 2.0  # nobody at the boundary
    losses = method.losses(torch.Generator().manual_seed(0), 32)
    losses["loss"].backward()
    assert all(p.grad is None for p in method.first.parameters())


def test_a_student_that_is_the_exact_map_has_no_loss_but_that_of_the_hop():
    """With the exact jumps as student and first stage the target is the exact jump up to the teacher's short hop."""

    class Exact(torch.nn.Module):
        def forward(self, x, t, condition):
            return RING(x, t, condition, r=torch.zeros_like(t))

    method = stage(Exact(), hops=(2000, 2000))
    method.first = method.student
    losses = method.losses(torch.Generator().manual_seed(0), 64)
    assert losses["loss"] < 1e-2 * pseudo_huber(torch.ones(1, 2)).item()


@pytest.mark.parametrize("wrong", [{"transition": 0.0}, {"boundary": 1.0}, {"boundary_weight": -1.0}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="0 < transition < 1, 0 <= boundary < 1"):
        TruncatedSettings(**wrong)
