"""Two processes do what one does: same losses, same weights, same average, for every way of holding the networks."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchrun_program
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchrun_program import SCENARIOS, Adapters, Chase, Pictures, run

from diffusion_opt.training import Processes, TrainConfig, TrainResult, distributed, process_group, processes, shard
from diffusion_opt.training.config import shared_micro_batches

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@dataclass
class TwoProcesses:
    out: Path
    whole: TrainResult  # seven steps of `Chase` by one process
    weights: dict[str, Tensor]

    def told(self, name: str, rank: int = 0) -> dict:
        return json.loads((self.out / name / f"result-{rank}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    """All scenarios, in one launch of two processes."""
    out = tmp_path_factory.mktemp("two")
    whole = run(out / "whole", Chase())
    for name in ("finished_by_two", "finished_by_two_replicated"):
        run(out / name, Chase(), steps=4)
    program = [torchrun_program.__file__, str(out), *SCENARIOS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return TwoProcesses(out, whole, weights(out / "whole"))


def weights(out: Path) -> dict[str, Tensor]:
    files = {p.stem: load_file(p) for p in (out / "checkpoint").glob("*.safetensors")}
    return {f"{stem}/{name}": value for stem, tensors in files.items() for name, value in tensors.items()}


def average(told: dict) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in told["average"].items()}


def losses(history: list[dict]) -> list[float]:
    return [value for row in history for name, value in row.items() if name.endswith(("loss", "norm", "largest"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicated", "sharded", "mixed", "finished_by_two", "finished_by_two_replicated"])
def test_two_processes_make_the_steps_of_one(two, name):
    told, whole = two.told(name), two.whole
    assert (told["step"], told["finished"], told["world_size"]) == (7, True, 2)
    seen = losses(whole.history)[-len(losses(told["history"])) :]
    assert len(seen) in (21, 9) and losses(told["history"]) == pytest.approx(seen, rel=2e-4)
    for found, expected in zip(average(told).values(), whole.ema.parameters(), strict=True):
        torch.testing.assert_close(found, expected.flatten(), **TOLERANCE)


@pytest.mark.slow
def test_a_network_of_blocks_is_sharded_block_by_block(two, tmp_path):
    told, whole = two.told("pictures"), run(tmp_path, Pictures(), steps=2)
    assert losses(told["history"]) == pytest.approx(losses(whole.history), rel=2e-4)
    for found, expected in zip(average(told).values(), whole.ema.parameters(), strict=True):
        torch.testing.assert_close(found, expected.flatten(), **TOLERANCE)


@pytest.mark.slow
def test_adapters_train_on_a_sharded_base(two, tmp_path):
    told, whole = two.told("adapters"), run(tmp_path, Adapters(), steps=3)
    assert losses(told["history"]) == pytest.approx(losses(whole.history), rel=2e-4)
    for found, expected in zip(average(told).values(), whole.ema.parameters(), strict=True):
        torch.testing.assert_close(found, expected.flatten(), **TOLERANCE)


@pytest.mark.slow
def test_both_processes_know_the_values_of_all_and_the_first_alone_writes_and_holds_the_average(two):
    first, second = two.told("sharded", 0), two.told("sharded", 1)
    assert losses(first["history"]) == losses(second["history"])
    assert (first["meta"], second["meta"]) == (False, True)
    lines = (two.out / "sharded" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert two.told("replicated", 0)["average"] == two.told("replicated", 1)["average"]


@pytest.mark.slow
def test_replicated_networks_write_the_checkpoint_of_one_process(two):
    found = weights(two.out / "replicated")
    assert found.keys() == two.weights.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, two.weights[name], **TOLERANCE)


@pytest.mark.slow
def test_sharded_checkpoints_hold_slices_in_safetensors_and_no_pickle(two):
    folder = two.out / "sharded" / "checkpoint"
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert len(names) == 3 and names[2] == "state.json"
    assert all(name.startswith("shards/") and name.endswith(".safetensors") for name in names[:2])
    rows = {}
    for name in names[:2]:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dictionary
                rows.setdefault(key, []).append(file.get_slice(key).get_shape()[:1])
    assert rows["student/layers.0.weight"] == [[5], [4]]  # nine rows on two processes
    assert {"ema/layers.0.weight", "fake_score-optimizer/0.exp_avg_sq"} <= rows.keys()


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(two):
    result = run(two.out / "begun_by_two", Chase(seed=5))
    assert (result.step, result.finished) == (7, True)
    assert losses(result.history) == pytest.approx(losses(two.whole.history)[-9:], rel=2e-4)
    for found, expected in zip(result.ema.parameters(), two.whole.ema.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.slow
def test_an_interrupt_of_one_process_stops_all_after_the_same_step_and_the_run_goes_on(two):
    told = [two.told("interrupted", rank) for rank in (0, 1)]
    assert [(one["step"], one["finished"]) for one in told] == [(4, False)] * 2
    result = run(two.out / "interrupted", Chase(seed=5))
    for found, expected in zip(result.ema.parameters(), two.whole.ema.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.slow
def test_a_time_budget_ends_with_the_slowest_process(two):
    first, second = two.told("slow", 0), two.told("slow", 1)
    assert first["finished"] and second["finished"]
    assert (first["step"], first["seconds"]) == (second["step"], second["seconds"])
    assert first["average"] == second["average"]  # the learning rate follows the clock: it was the same one


@pytest.mark.slow
def test_averaged_gradients_are_those_of_torch_ddp(two):
    for rank in (0, 1):
        told = json.loads((two.out / "torch_ddp" / f"gradients-{rank}.json").read_text())
        assert told["moved"] > 1e-4 and told["apart"] < 1e-6


def test_the_batch_depends_on_micro_batches_and_not_on_who_computes_them():
    assert [shared_micro_batches(12, 4, world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ValueError, match="4 micro-batches per step cannot be shared evenly by 3 processes"):
        shared_micro_batches(12, 4, 3)
    with pytest.raises(ValueError, match="batch_size=12 cannot be cut into 5 equal"):
        shared_micro_batches(12, 5, 1)


def test_alone_there_is_nothing_to_agree_on():
    network = nn.Linear(2, 3)
    with process_group() as among:
        assert among == processes() == Processes() and among.is_main and not dist.is_initialized()
        assert among.largest(1.5, True) == [1.5, True] and among.mean({"loss": 2.0}) == {"loss": 2.0}
        assert shard(network) is network and type(network) is nn.Linear
        with among.main_first():
            among.wait()


def test_processes_that_have_not_joined_are_told_how(monkeypatch, tmp_path):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"with diffusion_opt.training.process_group\(\)"):
        run(tmp_path, Chase())


def test_blocks_are_the_members_of_the_outermost_lists():
    model = Pictures().model
    blocks = list(distributed.blocks_of(model))
    assert blocks == [*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks]


def test_accumulation_is_one_batch_in_parts(tmp_path):
    """The gradient of two micro-batches is the mean of theirs, and values are means too."""
    parts = [torch.Generator().manual_seed(s) for s in (0, 2_654_435_761)]
    method = Chase()
    expected = [method.losses(generator, 6, "student") for generator in parts]
    loss = sum(values["loss"] for values in expected) / 2
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in method.student.parameters()]).norm()
    row = run(tmp_path, Chase(), steps=1).history[0]
    assert row["loss"] == pytest.approx(loss.item()) and row["gradient_norm"] == pytest.approx(norm.item())
    assert row["largest"] == pytest.approx(sum(float(values["largest"]) for values in expected) / 2)
    assert TrainConfig(steps=1).accumulate is None
