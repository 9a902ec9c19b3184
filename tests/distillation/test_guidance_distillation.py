"""Guidance distillation: exact at the guided velocity, at one scale and over a range; its gradient points there."""

import pytest
import torch
from torch import nn

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory import GuidanceDistillation, guided_velocity
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided
from diffusion_opt.training import step_generator

MODES = GaussianMixtureVelocity.ring(num_modes=4, radius=1.5, std=0.3, num_classes=2)
LABELS = torch.arange(64) % 2
DATA = ImageData(MODES.sample(64, step_generator(0, 0), ClassCondition(LABELS, 2)), LABELS, ("even", "odd"))


class _Guided(nn.Module):
    """The guided velocity in closed form, with a trainable offset, at the scale it is given or at a fixed one."""

    def __init__(self, fixed: float | None = None) -> None:
        super().__init__()
        self.fixed, self.offset = fixed, nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, condition=None, r=None, guidance=None):
        assert (guidance is None) == (self.fixed is not None)
        scale = torch.full_like(t, self.fixed) if guidance is None else guidance
        return guided_velocity(MODES, x_t, t, condition, scale) + self.offset


def test_a_scale_for_each_sample_is_guidance_one_by_one():
    x, t = torch.randn(6, 2, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    condition, scale = ClassCondition(torch.arange(6) % 2, 2), torch.linspace(0, 4, 6, dtype=torch.float64)
    found = guided_velocity(MODES, x, t, condition, scale)
    for i, w in enumerate(scale.tolist()):
        one = Guided(MODES, w)(x[i : i + 1], t[i : i + 1], condition[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scales", "fixed"), [((2.5, 2.5), 2.5), ((1.0, 4.0), None)], ids=["fixed", "range"])
def test_the_loss_is_zero_at_the_guided_velocity_and_its_gradient_is_the_offset(scales, fixed):
    student = _Guided(fixed)
    distiller = GuidanceDistillation(student, MODES, DATA, scales)
    assert distiller.losses(step_generator(0, 0), 64)["loss"] < 1e-10
    with torch.no_grad():
        student.offset.copy_(torch.tensor([0.3, -0.2]))
    distiller.losses(step_generator(0, 0), 64)["loss"].backward()
    torch.testing.assert_close(student.offset.grad, student.offset.detach(), rtol=1e-4, atol=1e-5)  # of mean (a, b)^2


def test_another_scale_is_seen():
    assert GuidanceDistillation(_Guided(1.0), MODES, DATA, (3.0, 3.0)).losses(step_generator(0, 0), 64)["loss"] > 0.01


def test_scales_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"must rise from at least 0, .* got \(3.0, 1.0\)"):
        GuidanceDistillation(_Guided(), MODES, DATA, (3.0, 1.0))
