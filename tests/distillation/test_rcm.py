"""Trajectory and distribution together: the sum is a sum, and both parts reach the same student."""

import pytest
import torch
from distillation.planes import points_of, toy

from diffusion_opt.distillation.distribution import DistributionMatching, RegularizedMatching
from diffusion_opt.distillation.trajectory.flow_map_distillation import METHODS, FlowMapDistillation
from diffusion_opt.flow import GaussianMixtureVelocity
from diffusion_opt.models import PointVelocity
from diffusion_opt.subjects import Classes

RING = GaussianMixtureVelocity.ring(num_modes=3, num_classes=1)


def gradient(method: DistributionMatching) -> tuple[dict, torch.Tensor]:
    method.student.zero_grad()
    losses = method.losses(torch.Generator().manual_seed(0), 16, "student")
    losses["loss"].backward()
    return losses, torch.cat([weight.grad.flatten() for weight in method.student.parameters()])


def test_loss_and_gradient_are_the_sum_of_the_parts() -> None:
    student = PointVelocity(num_classes=1, two_time=True, width=16)
    options = {"student": student, "fake_score": PointVelocity(num_classes=1, width=16), "conditions": Classes(1)}
    path = FlowMapDistillation(student, RING, points_of(RING, 64), METHODS["flow_map"])
    alone = toy(DistributionMatching, RING, **options)
    both = toy(RegularizedMatching, RING, trajectory=path.losses, trajectory_weight=3.0, **options)
    matching, matching_gradient = gradient(alone)
    losses, sum_gradient = gradient(both)
    torch.testing.assert_close(losses["loss"], matching["loss"] + 3 * losses["trajectory"])
    student.zero_grad()
    generator = torch.Generator().manual_seed(0)
    alone.losses(generator, 16, "student")  # the draws that come first
    (3 * path.losses(generator, 16)["loss"]).backward()
    trajectory_gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()])
    torch.testing.assert_close(sum_gradient, matching_gradient + trajectory_gradient)
    assert min(matching_gradient.abs().max(), trajectory_gradient.abs().max()) > 0


def test_the_fake_score_s_turn_is_as_without() -> None:
    both = toy(RegularizedMatching, RING, trajectory=lambda generator, num: pytest.fail("not on this turn"))
    assert both.losses(torch.Generator().manual_seed(0), 8, "fake_score")["loss"].item() > 0


def test_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="trajectory_weight must be positive, got 0"):
        toy(RegularizedMatching, RING, trajectory=lambda generator, num: {}, trajectory_weight=0.0)
