"""Stored teacher trajectories: what they hold, and that interrupting or splitting the work changes nothing."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusion_opt.datasets import CorruptFileError, FolderInUseError, folder_lock
from diffusion_opt.distillation.trajectory import OdePairs, PairConfig, generate_pairs, load_pairs, sample_noise
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided, adams_bashforth2, sampling_times
from diffusion_opt.subjects import Classes

SHAPE = (1, 4, 6)
CONFIG = PairConfig(num_pairs=11, guidance_scale=1.0, num_rungs=2, num_steps=8, shard_size=4)


@pytest.fixture(scope="module")
def teacher() -> GaussianMixtureVelocity:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, *SHAPE, generator=generator)
    return GaussianMixtureVelocity(
        weights=torch.full((3,), 1 / 3), means=means, stds=torch.full((3, *SHAPE), 0.2), classes=torch.arange(3)
    )


class Interrupted(Exception):
    pass


class _FailsAfter:
    """The teacher, until its calls are used up."""

    def __init__(self, teacher: GaussianMixtureVelocity, calls: int) -> None:
        self.teacher, self.left = teacher, calls

    def __call__(self, x_t, t, condition=None, r=None):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return self.teacher(x_t, t, condition)


def made(teacher, config: PairConfig, folder: Path, source: str = "ring") -> OdePairs:
    given = {"source": {"name": source, "model": source}, "progress": False}
    return generate_pairs(partial(Guided, teacher), SHAPE, Classes(3), config, folder, **given)


def test_states_are_the_solver_s_at_the_rungs(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    pairs = made(teacher, CONFIG, tmp_path)
    assert pairs.states.shape == (11, 3, *SHAPE)
    assert pairs.times.tolist() == [1.0, 0.5, 0.0]
    assert pairs.labels.tolist() == [i % 3 for i in range(11)]
    noise = sample_noise(range(11), SHAPE, CONFIG.seed)
    times = sampling_times(8)
    condition = ClassCondition(pairs.labels, 3)
    middle = adams_bashforth2(Guided(teacher, 1.0), noise, times[:5], condition)
    end = adams_bashforth2(Guided(teacher, 1.0), noise, times, condition)
    for rung, expected in enumerate((noise, middle, end)):
        assert torch.allclose(pairs.states[:, rung], expected, atol=4e-3)  # stored in half precision


def test_guidance_counts_in_its_interval(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, guidance_scale=3.0, guidance_interval=(0.5, 0.9))
    pairs = made(teacher, config, tmp_path / "limited")
    plain = made(teacher, CONFIG, tmp_path / "plain")
    assert made(teacher, config, tmp_path / "limited").states.equal(pairs.states)
    start = sample_noise(range(11), SHAPE, CONFIG.seed)
    condition = ClassCondition(pairs.labels, 3)
    expected = adams_bashforth2(Guided(teacher, 3.0, (0.5, 0.9)), start, sampling_times(8), condition)
    assert torch.allclose(pairs.states[:, -1], expected, atol=4e-3)
    assert not torch.allclose(pairs.states[:, -1], plain.states[:, -1], atol=4e-3)


def test_shards_do_not_change_the_trajectories(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    one = made(teacher, CONFIG, tmp_path / "a")
    other = dataclasses.replace(CONFIG, shard_size=7)
    two = made(teacher, other, tmp_path / "b")
    assert torch.allclose(one.states, two.states, atol=2e-3)
    assert torch.equal(one.labels, two.labels)


def test_an_interrupted_store_goes_on_where_it_stopped(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    whole = made(teacher, CONFIG, tmp_path / "whole")
    with pytest.raises(Interrupted):
        made(_FailsAfter(teacher, 12), CONFIG, tmp_path / "cut")
    with pytest.raises(CorruptFileError, match="not finished: 4 of 11"):
        load_pairs(tmp_path / "cut")
    counted = _FailsAfter(teacher, 1000)
    resumed = made(counted, CONFIG, tmp_path / "cut")
    assert torch.equal(whole.states, resumed.states)
    assert 1000 - counted.left == 2 * 8  # two of three shards were missing


def test_a_damaged_shard_is_named(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    made(teacher, CONFIG, tmp_path)
    shard = tmp_path / "pairs-000004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptFileError, match=r"pairs-000004.safetensors is missing or damaged"):
        load_pairs(tmp_path)


def test_other_settings_need_another_folder(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    made(teacher, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="use another folder"):
        made(teacher, dataclasses.replace(CONFIG, seed=1), tmp_path)


def test_another_teacher_needs_another_folder_and_a_renamed_one_does_not(
    teacher: GaussianMixtureVelocity, tmp_path: Path
) -> None:
    made(teacher, CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"trajectories of the teacher 'ring' \(model ring\), now it is 'other'"):
        made(teacher, CONFIG, tmp_path, source="other")
    same = {"source": {"name": "moved/ring", "model": "ring"}, "progress": False}
    generate_pairs(partial(Guided, teacher), SHAPE, Classes(3), CONFIG, tmp_path, **same)


def test_a_teacher_that_is_not_finite_leaves_no_shard(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    def broken(x_t, t, condition=None, r=None):
        return teacher(x_t, t, condition) + torch.where(condition.labels == 2, torch.nan, 0.0)[:, None, None, None]

    with pytest.raises(FloatingPointError, match=r"the teacher \(ring\) makes no finite picture of sample \d+"):
        made(broken, CONFIG, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "manifest.json").exists()


def test_two_processes_do_not_make_one_store(teacher: GaussianMixtureVelocity, tmp_path: Path) -> None:
    with folder_lock(tmp_path, "trajectories"), pytest.raises(FolderInUseError, match="trajectories"):
        made(teacher, CONFIG, tmp_path)
    stored = made(teacher, CONFIG, tmp_path)
    with folder_lock(tmp_path, "trajectories"):  # a whole store is only read
        assert torch.equal(made(teacher, CONFIG, tmp_path).states, stored.states)


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="make them with generate_pairs"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pairs": 0}, "at least 1"),
        ({"num_steps": 7}, "num_steps=7 must be a multiple of num_rungs=2"),
        ({"solver": "guess"}, "solver must be one of .*, got 'guess'"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_noise_depends_on_seed_and_index_only() -> None:
    assert torch.equal(sample_noise(range(5, 9), SHAPE, 2), sample_noise(range(9), SHAPE, 2)[5:])
    assert not torch.equal(sample_noise(range(2), SHAPE, 2), sample_noise(range(2), SHAPE, 3))
