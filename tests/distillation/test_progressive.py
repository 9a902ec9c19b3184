"""Progressive distillation: the identity with the teacher in both places, zero at the exact map; stages resume."""

import copy

import pytest
import torch
from torch import nn

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory import ProgressiveDistillation, progressive, train_progressively
from diffusion_opt.distillation.trajectory.flow_map import hop_target
from diffusion_opt.distillation.trajectory.progressive import progressive_target
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, euler
from diffusion_opt.models import PointVelocity
from diffusion_opt.training import TrainConfig, step_generator, train

MODES = GaussianMixtureVelocity.ring(num_modes=4, radius=1.5, std=0.3, num_classes=2)
LABELS = torch.arange(64) % 2
DATA = ImageData(MODES.sample(64, step_generator(0, 0), ClassCondition(LABELS, 2)), LABELS, ("even", "odd"))


def points() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(64, generator=generator, dtype=torch.float64)
    return x_t, t, t - 0.2, ClassCondition(LABELS, 2)


def test_two_hops_are_the_identity_with_both_jumps_by_the_teacher():
    x_t, t, r, condition = points()
    by_identity = hop_target(x_t, t, (t + r) / 2, r, MODES(x_t, t, condition), lambda x, t, r: MODES(x, t, condition))
    torch.testing.assert_close(progressive_target(MODES, x_t, t, r, condition), by_identity, rtol=0, atol=1e-14)


@pytest.mark.parametrize("hops", [2, 5])
def test_the_target_is_where_the_sampler_gets(hops):
    x_t, _, _, condition = points()
    t, r = torch.full((64,), 0.8, dtype=torch.float64), torch.full((64,), 0.3, dtype=torch.float64)
    target = progressive_target(MODES, x_t, t, r, condition, hops)
    walked = euler(MODES, x_t, torch.linspace(0.8, 0.3, hops + 1, dtype=torch.float64), condition)
    torch.testing.assert_close(x_t - 0.5 * target, walked, rtol=0, atol=1e-13)


class _Two(nn.Module):
    """Exactly two Euler hops of the teacher in one step of 1 / steps, and a trainable offset."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.offset = steps, nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, condition=None, r=None):
        return progressive_target(MODES, x_t, t, t - 1 / self.steps, condition) + self.offset


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loss_is_zero_at_the_exact_student_and_its_gradient_points_there(steps):
    student = _Two(steps)
    distiller = ProgressiveDistillation(student, MODES, DATA, steps)
    assert distiller.losses(step_generator(1, 0), 64)["squared_error"] < 1e-12
    with torch.no_grad():
        student.offset.copy_(torch.tensor([0.3, -0.2]))
    distiller.losses(step_generator(1, 0), 64)["loss"].backward()
    assert nn.functional.cosine_similarity(student.offset.grad, student.offset, dim=0) > 0.999


def test_stages_hand_on_their_students_and_an_interrupted_run_goes_on(tmp_path):
    network = PointVelocity(num_classes=2, width=16, depth=1)
    config = TrainConfig(steps=12, batch_size=8, checkpoint_seconds=1e9)
    whole = train_progressively(MODES, network, DATA, (4, 2, 1), config, tmp_path / "a", progress=False)
    assert list(whole) == [4, 2, 1] and [result.step for result in whole.values()] == [4, 4, 4]
    assert all((tmp_path / "a" / f"steps-{steps}" / "checkpoint").is_dir() for steps in whole)
    first = train_progressively(MODES, network, DATA, (4,), TrainConfig(steps=4, batch_size=8, decay_fraction=1.0),
                                tmp_path / "b", progress=False)  # fmt: skip
    assert _same(first[4].ema, whole[4].ema)
    resumed = train_progressively(MODES, network, DATA, (4, 2, 1), config, tmp_path / "b", progress=False)
    assert all(_same(resumed[steps].ema, whole[steps].ema) for steps in whole)


def test_a_stage_starts_from_the_last_student_and_is_taught_by_it(tmp_path, monkeypatch):
    stages = []

    def recorded(stage, *arguments):
        start = copy.deepcopy(stage.student)
        stages.append((stage, start, train(stage, *arguments).ema))
        return train(stage, *arguments)  # finished: read back

    monkeypatch.setattr(progressive, "train", recorded)
    network = PointVelocity(num_classes=2, width=16, depth=1)
    config = TrainConfig(steps=6, batch_size=8)
    train_progressively(MODES, network, DATA, (2, 1), config, tmp_path, progress=False, first_hops=3)
    (first, first_start, first_end), (second, second_start, _) = stages
    assert first.teacher is MODES and (first.steps, first.hops) == (2, 3) and _same(first_start, network)
    assert (second.steps, second.hops) == (1, 2)
    assert _same(second.teacher, first_end) and _same(second_start, first_end) and not _same(first_end, network)


def _same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"halve the steps, for example \(4, 2, 1\), got \(4, 1\)"):
        train_progressively(MODES, PointVelocity(), DATA, (4, 1), TrainConfig(steps=1), tmp_path)
    with pytest.raises(ValueError, match="hops at least 2, got 1 and 1"):
        ProgressiveDistillation(PointVelocity(), MODES, DATA, 1, hops=1)
