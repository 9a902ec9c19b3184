"""Students on the plane after seconds of training: how far they are from the exact distribution, and the failures.

The truth is 4 000 samples of the mixture; two such samples are 0.05 apart (sliced Wasserstein). The teacher's own Euler
steps reach 1.08, 0.42 and 0.12 in 1, 2 and 4 steps, which is what a student has to beat.
"""

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.trajectory import (
    METHODS,
    FlowMapDistillation,
    GuidanceDistillation,
    OdeDistillation,
    PairConfig,
    Reflow,
    generate_pairs,
    train_progressively,
)
from diffusion_opt.distillation.trajectory.failures import FAILURES
from diffusion_opt.evaluation.point_distances import mmd, sliced_wasserstein
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided, heun, sampling_times
from diffusion_opt.models import PointVelocity
from diffusion_opt.subjects import Classes
from diffusion_opt.training import TrainConfig, train

pytestmark = pytest.mark.slow
RING = GaussianMixtureVelocity.ring(num_modes=6, radius=1.5, std=0.2, num_classes=2)
NUM = 4000
CONDITION = ClassCondition(torch.arange(NUM) % 2, 2)
LADDERS = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.9, 0.75, 0.5]}


def drawn(num: int, seed: int) -> torch.Tensor:
    return RING.sample(num, torch.Generator().manual_seed(seed), ClassCondition(torch.arange(num) % 2, 2))


DATA = ImageData(drawn(4096, 1), torch.arange(4096) % 2, ("even", "odd"))


def trained(distiller, folder: Path, steps: int = 800, rate: float = 2e-3) -> nn.Module:
    config = TrainConfig(steps=steps, batch_size=256, learning_rate=rate, ema_decay=0.99, warmup_steps=20)
    return train(distiller, config, folder, progress=False).ema.requires_grad_(True)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Networks fitted to the exact velocity, by the width of their time embedding: where students start."""
    made = {}

    def make(waves: int = 4) -> PointVelocity:
        if waves not in made:
            distiller = GuidanceDistillation(PointVelocity(num_classes=2, waves=waves), RING, DATA, (1.0, 1.0))
            made[waves] = trained(distiller, tmp_path_factory.mktemp("teacher"), steps=1500, rate=3e-3)
        return copy.deepcopy(made[waves])

    return make


@torch.no_grad()
def sample(network: nn.Module, steps: int, renoise: bool = False, guidance: float | None = None) -> torch.Tensor:
    """Points of a student: Euler along its jumps, or predict and noise again."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(NUM, 2, generator=generator)
    times = [*LADDERS[steps], 0.0] if renoise else sampling_times(steps).tolist()
    for t, r in pairwise(times):
        given = {"r": torch.full((NUM,), r)} if network.two_time else {}
        given |= {} if guidance is None else {"guidance": torch.full((NUM,), guidance)}
        velocity = network(x, torch.full((NUM,), t), CONDITION, **given)
        if renoise:
            x = (1 - r) * (x - t * velocity) + r * torch.randn(NUM, 2, generator=generator)
        else:
            x = x - (t - r) * velocity
    return x


def distances(points: torch.Tensor, truth: torch.Tensor | None = None) -> tuple[float, float]:
    truth = drawn(NUM, 2) if truth is None else truth
    found = sliced_wasserstein(points, truth), mmd(points, truth, scale=0.3)
    print(f"sliced Wasserstein {found[0]:.3f}, squared MMD {found[1]:.4f}")
    return found


def start(teacher: PointVelocity, two_time: bool) -> PointVelocity:
    return teacher.with_slot(two_time=True) if two_time else teacher


@pytest.mark.parametrize(
    ("name", "rate", "bounds"),
    [
        ("flow_map", 2e-3, (0.17, 0.15, 0.11)),
        ("consistency", 2e-3, (0.22, 0.2, 0.2)),
        ("consistency_training", 2e-3, (0.28, 0.2, 0.2)),
        ("mean_flow", 2e-3, (0.28, 0.25, 0.2)),
        ("shortcut", 1e-3, (0.16, 0.13, 0.11)),
    ],
)
def test_one_checkpoint_serves_one_two_and_four_steps(teachers, tmp_path, name, rate, bounds):
    settings = METHODS[name]
    student = start(teachers(), settings.two_time)
    network = trained(FlowMapDistillation(student, RING, DATA, settings), tmp_path, rate=rate)
    for steps, bound in zip((1, 2, 4), bounds, strict=True):
        wasserstein, discrepancy = distances(sample(network, steps, renoise=not settings.two_time))
        assert wasserstein < bound and discrepancy < 0.06


def test_progressive_students_of_all_stages(teachers, tmp_path):
    config = TrainConfig(steps=1500, batch_size=256, learning_rate=2e-3, ema_decay=0.98, warmup_steps=20)
    results = train_progressively(RING, teachers(), DATA, (4, 2, 1), config, tmp_path, progress=False, first_hops=4)
    for steps, result in results.items():
        wasserstein, discrepancy = distances(sample(result.ema, steps))
        assert wasserstein < 0.11 and discrepancy < 0.005


def test_students_of_pairs(teachers, tmp_path):
    config = PairConfig(num_pairs=4096, guidance_scale=1.0, num_rungs=4, num_steps=16, shard_size=4096)
    pairs = generate_pairs(
        partial(Guided, RING), (2,), Classes(2), config, tmp_path / "pairs", source={"model": "ring"}, progress=False
    )
    for steps in (1, 4):
        network = trained(OdeDistillation(teachers(), pairs, steps), tmp_path / f"ode-{steps}")
        assert distances(sample(network, steps))[0] < 0.08
    network = trained(Reflow(teachers(), pairs), tmp_path / "reflow")
    for steps in (1, 2, 4):
        wasserstein, discrepancy = distances(sample(network, steps))
        assert wasserstein < 0.11 and discrepancy < 0.005


def test_guidance_is_an_input_of_a_consistency_student(teachers, tmp_path):
    student = teachers().with_slot(guided=True)
    network = trained(FlowMapDistillation(student, RING, DATA, METHODS["lcm"]), tmp_path)
    noise = torch.randn(NUM, 2, generator=torch.Generator().manual_seed(9))
    for scale in (1.0, 3.0):
        with torch.no_grad():
            truth = heun(Guided(RING, scale), noise, sampling_times(48), CONDITION)
        assert distances(sample(network, 2, renoise=True, guidance=scale), truth)[0] < 0.22


@pytest.mark.parametrize("name", sorted(FAILURES))
def test_each_failure_fails_and_its_cure_works(teachers, tmp_path, name):
    failure, found = FAILURES[name], {}
    for cured in (False, True):
        student = start(teachers(4 if cured else failure.broken_waves), failure.cured.two_time)
        distiller = failure.distiller(cured, student, RING, DATA)
        network = trained(distiller, tmp_path / str(cured), steps=500)
        found[cured] = distances(sample(network, 1, renoise=not failure.cured.two_time))[0]
    assert found[True] < 0.6 * found[False]
