"""The drill itself: what a fault does is seen, and a few of each are survived."""

import random

import pytest
import torch

from diffusion_opt.training import TrainConfig, train
from diffusion_opt.training.drill import METRICS, Pursuit, content, damage, in_a_process


@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_damage_is_damage(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    damage(path, how, random.Random(0))
    if how == "lost":
        assert not path.exists()
        return
    found = path.read_bytes()
    wrong = sum((a ^ b).bit_count() for a, b in zip(found, bytes(range(100)), strict=False))
    assert (len(found), wrong) == (100, 1) if how == "flipped" else (len(found) < 100 and wrong == 0)


def test_two_runs_are_compared_in_all_but_the_clock(tmp_path):
    """Also that the drill's run is worth drilling: all its parts move."""
    config = TrainConfig(steps=6, batch_size=4, log_every=2)
    for name in ("a", "b"):
        method = Pursuit()
        start = method.slow[0].weight.clone()
        train(method, config, tmp_path / name, progress=False)
    one, other = content(tmp_path / "a"), content(tmp_path / "b")
    assert one == other and len(one) == 7 and b'"step": 6' in one[METRICS]
    assert not torch.equal(start, method.slow[0].weight) and method.notes == {"steps": 6.0}
    (tmp_path / "b" / METRICS).write_text("")
    assert content(tmp_path / "b") != one


@pytest.mark.slow
def test_a_few_of_each_fault_are_survived(tmp_path):
    rows = in_a_process(kills=12, others=3, folder=tmp_path)
    assert sum(row.tries for row in rows) >= 12 + 3 * 7
    assert [row.examples for row in rows if row.wrong] == []
    assert {row.fault: row.refused for row in rows if "checkpoint" in row.fault} == {
        "a flipped bit in a checkpoint": 3, "a checkpoint cut off": 3, "a file of a checkpoint lost": 3
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
