"""Refinement: exact where every jump is known, the times of its students, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from diffusion_opt.distillation.methods import METHODS
from diffusion_opt.distillation.plan import StudentPlan, sampling_of
from diffusion_opt.distillation.trajectory import TAU, Refinement, RefinementSettings
from diffusion_opt.flow import expand_time
from diffusion_opt.subjects import Classes


class Draws(nn.Module):
    """Every path leads to one picture: the velocity is (x_t - picture) / t."""

    def __init__(self, picture: float) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.tensor(picture))

    def forward(self, x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return (x_t - self.picture) / expand_time(t, x_t)


def loss(student: float, start: float, teacher: float, times: tuple[float, ...], share: float = 0.75) -> float:
    distiller = Refinement(
        Draws(student), Draws(start), Draws(teacher), Classes(3), (1, 2, 5), times, RefinementSettings(share)
    )
    return distiller.losses(torch.Generator().manual_seed(0), 7)["squared_error"].item()


def test_a_student_of_one_step_is_right_when_it_draws_what_the_teacher_makes_of_the_start() -> None:
    assert loss(student=0.3, start=0.8, teacher=0.3, times=(1.0,)) == pytest.approx(0, abs=1e-12)
    assert loss(student=0.8, start=0.8, teacher=0.3, times=(1.0,)) == pytest.approx(0.25, rel=1e-4)


def test_the_second_jump_is_the_teachers_and_the_first_one_stays() -> None:
    assert loss(student=0.3, start=0.8, teacher=0.3, times=(1.0, TAU), share=1.0) == pytest.approx(0, abs=1e-12)
    wrong = loss(student=0.8, start=0.8, teacher=0.3, times=(1.0, TAU), share=1.0)
    assert wrong == pytest.approx(0.25, rel=1e-4)
    first = loss(student=0.8, start=0.8, teacher=0.3, times=(1.0, TAU), share=1e-9)
    assert first == pytest.approx(0, abs=1e-12)  # the first jump of the start itself


def test_gradients_reach_the_student_alone() -> None:
    student, start, teacher = Draws(0.1), Draws(0.8), Draws(0.3)
    distiller = Refinement(student, start, teacher, Classes(3), (1, 2, 5), (1.0, TAU))
    distiller.losses(torch.Generator().manual_seed(0), 7)["loss"].backward()
    assert student.picture.grad is not None
    assert start.picture.grad is None
    assert teacher.picture.grad is None


def test_a_student_of_two_steps_is_sampled_where_it_was_trained() -> None:
    plan = StudentPlan("fashion", "refine", 2, 1.0, start="fashion-1step")
    assert sampling_of(plan, METHODS["refine"], two_time=False).ladders == ((1.0, TAU),)
    assert not sampling_of(plan, METHODS["refine"], two_time=False).renoise


def test_other_times_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"times \(1,\) or \(1, 0.2\), got \(1.0, 0.5\)"):
        loss(0.1, 0.1, 0.1, (1.0, 0.5))
    with pytest.raises(ValueError, match="share must lie in"):
        RefinementSettings(0.0)
