"""What a student of several steps is trained on: its own points on each rung, and the gradient of the last pass."""

import pytest
import torch
from distillation.planes import points_of, toy
from torch import Tensor, nn

from diffusion_opt.distillation.distribution import DistributionMatching
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, interpolate
from diffusion_opt.models import PointVelocity
from diffusion_opt.subjects import Classes

RING = GaussianMixtureVelocity.ring(num_modes=3)
LADDER = (1.0, 0.75, 0.5)


class Shrinks(nn.Module):
    """u = scale * x_t, so that the clean prediction is (1 - t scale) x_t; notes each call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x_t: Tensor, t: Tensor, condition: ClassCondition | None = None) -> Tensor:
        self.calls.append((x_t, t, condition, torch.is_grad_enabled()))
        return self.scale * x_t


def test_simulation_predicts_and_noises_again_on_each_sample_s_way_to_its_rung() -> None:
    method = toy(DistributionMatching, RING, student=Shrinks(), times=LADDER)
    noise, rungs = torch.randn(4, 2), torch.tensor([0, 1, 2, 2])
    x_t = method.simulate(noise, None, rungs, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 2, generator=generator), torch.randn(2, 2, generator=generator)
    at_second = 0.25 * 0.5 * noise[1:] + 0.75 * first
    at_third = 0.5 * (1 - 0.75 * 0.5) * at_second[1:] + 0.5 * second
    assert torch.equal(x_t[0], noise[0])
    torch.testing.assert_close(x_t[1], at_second[0])
    torch.testing.assert_close(x_t[2:], at_third)
    assert [len(call[0]) for call in method.student.calls] == [3, 2]


def test_the_gradient_goes_through_the_last_pass_only() -> None:
    student = Shrinks()
    method = toy(DistributionMatching, RING, student=student, times=LADDER)
    x, _ = method.generate(torch.Generator().manual_seed(1), 64)
    assert [call[3] for call in student.calls] == [False, False, True]
    x_t, t = student.calls[-1][:2]
    assert sorted(set(t.tolist())) == sorted(LADDER)
    (gradient,) = torch.autograd.grad(x.sum(), student.scale)
    torch.testing.assert_close(gradient, -(t[:, None] * x_t).sum())
    torch.testing.assert_close(x, (1 - t[:, None] * 0.5) * x_t)


def test_processes_of_a_sharded_student_make_the_same_passes_whatever_rungs_they_drew(monkeypatch) -> None:
    monkeypatch.setattr("diffusion_opt.distillation.distribution.rollout.is_sharded", lambda network: True)
    method = toy(DistributionMatching, RING, student=Shrinks(), times=LADDER)
    noise, rungs = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    x_t = method.simulate(noise, None, rungs, torch.Generator().manual_seed(0))
    first = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert [len(call[0]) for call in method.student.calls] == [4, 4]
    assert torch.equal(x_t[rungs == 0], noise[rungs == 0])
    torch.testing.assert_close(x_t[rungs == 1], (0.25 * 0.5 * noise + 0.75 * first)[rungs == 1])
    jumping = toy(DistributionMatching, RING, student=ExactMap(), times=(1.0, 0.5), between="jump")
    x, _ = jumping.generate(torch.Generator().manual_seed(2), 8)
    assert [len(t) for t, _ in jumping.student.jumps] == [8, 8, 8]
    noise, ones = torch.randn(8, 2, generator=torch.Generator().manual_seed(2)), torch.ones(8)
    torch.testing.assert_close(x, noise - jumping.student.law(noise, ones, r=0 * ones), rtol=0, atol=1e-5)


class ExactMap(nn.Module):
    """The exact flow map of a Gaussian, two-time, with a trainable offset."""

    two_time = True

    def __init__(self) -> None:
        super().__init__()
        self.law = GaussianMixtureVelocity(torch.ones(1), torch.tensor([[1.0, -0.5]]), torch.tensor([[0.4, 0.7]]))
        self.offset, self.jumps = nn.Parameter(torch.zeros(2)), []

    def forward(
        self, x_t: Tensor, t: Tensor, condition: ClassCondition | None = None, r: Tensor | None = None
    ) -> Tensor:
        self.jumps.append((t, r))
        return self.law(x_t, t, r=r) + self.offset


def test_jumps_of_an_exact_flow_map_end_where_one_jump_ends() -> None:
    method = toy(DistributionMatching, RING, student=ExactMap(), times=LADDER, between="jump")
    x, _ = method.generate(torch.Generator().manual_seed(2), 32)
    noise, ones = torch.randn(32, 2, generator=torch.Generator().manual_seed(2)), torch.ones(32)
    torch.testing.assert_close(x, noise - method.student.law(noise, ones, r=0 * ones), rtol=0, atol=1e-5)


def test_jumps_train_the_hop_to_the_next_rung_and_the_one_that_ends_it() -> None:
    """With a constant offset o in u the end moves by -(t - r) o - r o (of the map's own slope) after both jumps."""
    method = toy(DistributionMatching, RING, student=ExactMap(), times=(1.0, 0.5), between="jump")
    x, _ = method.generate(torch.Generator().manual_seed(2), 200)
    (t, r), (t_end, r_end) = method.student.jumps[-2:]
    assert set(zip(t.tolist(), r.tolist(), strict=True)) == {(1.0, 0.5), (0.5, 0.0)}
    assert set(t_end.tolist()) == {0.5} and set(r_end.tolist()) == {0.0}
    ended = torch.arange(200)[r == 0]
    (gradient,) = torch.autograd.grad(x[ended].sum(), method.student.offset, retain_graph=True)
    torch.testing.assert_close(gradient, torch.full((2,), -0.5 * len(ended)))
    (longer,) = torch.autograd.grad(x[r > 0].sum(), method.student.offset)
    deviation = (0.25 * method.student.law.stds[0] ** 2 + 0.25).sqrt()  # of x_t at 0.5; the map scales it to std
    expected = -0.5 * method.student.law.stds[0] / deviation - 0.5
    torch.testing.assert_close(longer / int((r > 0).sum()), expected.float())


def test_data_with_noise_may_stand_for_the_simulation() -> None:
    student, data = Shrinks(), points_of(RING, 50)
    method = toy(DistributionMatching, RING, student=student, times=LADDER, from_data=True, data=data)
    method.generate(torch.Generator().manual_seed(3), 64)
    (call,) = student.calls
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(64, 2, generator=generator)
    real = data.images[torch.randint(50, (64,), generator=generator)]
    torch.testing.assert_close(call[0], interpolate(real, noise, call[1]))


def test_a_two_time_student_is_asked_for_the_jump_to_the_picture() -> None:
    method = toy(DistributionMatching, RING, student=ExactMap(), times=LADDER)
    method.generate(torch.Generator().manual_seed(2), 8)
    assert all(bool((r == 0).all()) for _, r in method.student.jumps)


def test_generated_pictures_carry_the_asked_class() -> None:
    networks = {name: PointVelocity(num_classes=3, width=16) for name in ("student", "fake_score")}
    method = toy(DistributionMatching, RING, conditions=Classes(3), times=LADDER, **networks)
    x, condition = method.generate(torch.Generator().manual_seed(0), 7)
    assert x.shape == (7, 2)
    assert isinstance(condition, ClassCondition) and len(condition) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": (0.9, 0.5)}, r"times must fall from 1 .*, got \(0.9, 0.5\)"),
        ({"times": (1.0, 0.5, 0.0)}, "leave out the final 0"),
        ({"times": (1.0, 0.5, 0.6)}, "times must fall"),
        ({"between": "jump"}, "needs a two-time student"),
        ({"from_data": True}, "give data="),
        ({"fake_updates": -1}, "must not be negative"),
    ],
)
def test_ladders_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(DistributionMatching, RING, **options)
