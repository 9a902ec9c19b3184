"""What a run survives, and what it says of what it does not: damaged files, full disks, NaN, a second run, signals."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_opt.datasets import CorruptFileError, FolderInUseError, folder_lock
from diffusion_opt.training import Role, TrainConfig, TrainResult, train
from diffusion_opt.training.settings import FREE, changed, first_difference, networks_of, not_finite, settings_of

SETTINGS = {"batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_seconds": 1e9, "log_every": 4}


def small_network(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(1, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1))
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    return network


@dataclass
class Follow:
    """A student that fits a frozen teacher and a slow copy of itself, which is kept beside it, and counts its steps."""

    student: nn.Module = field(default_factory=small_network)
    teacher: nn.Module = field(default_factory=lambda: small_network(1).eval().requires_grad_(False))
    pull: float = 0.5
    hops: tuple[int, int] = (4, 32)
    limit: float = field(default=9.0, metadata=FREE)
    at_step: Callable[[int, dict[str, Tensor]], None] = lambda step, losses: None
    notes: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.slow = small_network(2).eval().requires_grad_(False)

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    @property
    def kept(self) -> dict[str, nn.Module]:
        return {"slow": self.slow}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        x = torch.rand(batch_size, 1, generator=generator)
        y = self.student(x)
        losses = {"loss": (y - self.teacher(x)).square().mean() + self.pull * (y - self.slow(x)).square().mean()}
        losses["spread"] = y.detach().std()
        with torch.no_grad():
            for slow, new in zip(self.slow.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(new, 0.1)
        self.at_step(int(self.notes.get("count", 0)), losses)
        return losses

    def alarm(self, step: int, values: dict[str, float]) -> str | None:
        if values:
            self.notes["count"] = self.notes.get("count", 0) + 1
            self.notes["spread"] = 0.9 * self.notes.get("spread", 1.0) + 0.1 * values["spread"]
        return "too wide" if self.notes["spread"] > self.limit else None


def run(out: Path, method: Follow | None = None, **settings) -> TrainResult:
    return train(method or Follow(), TrainConfig(**SETTINGS | {"steps": 8} | settings), out, progress=False)


def interrupt_at(step: int, number: int = signal.SIGINT) -> Callable[[int, dict[str, Tensor]], None]:
    return lambda now, losses: os.kill(os.getpid(), number) if now == step else None


def files(out: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, file by file: equal bytes are equal bits."""
    return {path.name: path.read_bytes() for path in sorted((out / "checkpoint").glob("*.safetensors"))}


def rows(out: Path) -> list[dict]:
    """`metrics.jsonl` without what follows the clock; strict JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A run that was stopped after three of eight steps."""
    assert run(tmp_path, Follow(at_step=interrupt_at(2))).step == 3
    return tmp_path


def test_a_resumed_run_is_the_uninterrupted_one_with_what_it_keeps_its_notes_and_its_rows(half, whole):
    method = Follow(student=small_network(5))
    result = run(half, method)
    assert result.finished and files(half) == files(whole) and "slow.safetensors" in files(half)
    assert method.notes["count"] == 8 and rows(half) == rows(whole)


@pytest.mark.parametrize("name", ["state.json", "ema.safetensors", "student-optimizer.safetensors", "slow.safetensors"])
@pytest.mark.parametrize("fault", ["bit", "cut", "empty", "lost"])
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_changed(half, name, fault):
    path = half / "checkpoint" / name
    content = path.read_bytes()
    if fault == "lost":
        path.unlink()
    elif fault == "bit":
        place = content.index(b'"step": ') + 8 if name == "state.json" else len(content) - 1
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes(content[: 0 if fault == "empty" else len(content) // 2])
    left = {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
    with pytest.raises(CorruptFileError, match=rf"{name} is (damaged|missing).*or delete .*checkpoint to start anew"):
        run(half)
    assert {p: p.read_bytes() for p in half.rglob("*") if p.is_file()} == left


@pytest.mark.parametrize("room", range(0, 1500, 100))
def test_a_disk_that_is_full_at_any_size_leaves_the_last_checkpoint_and_the_run_goes_on_with_space(half, whole, room):
    """Stands for a full disk: the kernel refuses to make a file of this process larger than `room` bytes."""
    before, soft = files(half), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, losses: dict[str, Tensor]) -> None:
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, soft[1]))

    try:
        with pytest.raises(OSError, match=r"could not write|File too large"):
            run(half, Follow(at_step=fill), checkpoint_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    state = json.loads((half / "checkpoint" / "state.json").read_text())
    assert state["step"] == 4 or (state["step"] == 3 and files(half) == before)
    assert run(half).finished
    assert files(half) == files(whole) and rows(half) == rows(whole)


def test_a_first_checkpoint_that_does_not_fit_is_no_checkpoint(tmp_path, whole):
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (whole / "checkpoint" / "state.json").stat().st_size - 100  # all tensors fit, the last file does not
    assert all(len(content) < limit for name, content in files(whole).items() if "optimizer" not in name)
    try:
        with pytest.raises(OSError, match="could not write"):
            fill = lambda step, losses: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))  # noqa: E731
            run(tmp_path, Follow(at_step=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert not (tmp_path / "checkpoint").exists()
    run(tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_on_a_loss_that_is_not_finite_the_good_weights_are_kept_and_saved(tmp_path, whole, bad):
    def spoil(step: int, losses: dict[str, Tensor]) -> None:
        if step == 5:
            losses["loss"] = losses["loss"] * bad

    method = Follow(at_step=spoil)
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 5 \(loss (nan|inf)\); lower .* good and saved in"
    ):
        run(tmp_path, method)
    assert not_finite(method.student) is None
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 5
    assert all(tensor.isfinite().all() for path in (tmp_path / "checkpoint").glob("*.safetensors")
               for tensor in load_file(path).values())  # fmt: skip


def test_weights_that_a_step_spoiled_are_not_saved_over_good_ones(tmp_path):
    def spoil(step: int, losses: dict[str, Tensor]) -> None:
        if step == 5:
            with torch.no_grad():
                method.student[0].weight[0] = math.nan

    method = Follow(at_step=spoil)
    told = (
        r"weights are not finite after step 6, first '0.weight' of the student; the last checkpoint in .* is as it was"
    )
    with pytest.raises(FloatingPointError, match=told):
        run(tmp_path, method, checkpoint_seconds=0)
    state = load_file(tmp_path / "checkpoint" / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("place", ["student", "teacher"])
def test_a_network_that_holds_nan_is_named_before_anything_is_written(tmp_path, place):
    method = Follow()
    with torch.no_grad():
        getattr(method, place)[3].bias[0] = math.nan
    with pytest.raises(
        ValueError, match=rf"the {place} of Follow is damaged: '3.bias' holds values that are not finite"
    ):
        run(tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_a_nan_that_is_only_logged_is_reported_and_metrics_stay_valid_json(tmp_path):
    def spoil(step: int, losses: dict[str, Tensor]) -> None:
        if step == 2:
            losses["share"] = torch.tensor(math.nan)

    with pytest.warns(UserWarning, match="share is nan at step 3; the loss is finite and training goes on"):
        result = run(tmp_path, Follow(at_step=spoil))
    assert result.finished and [row.get("share", 0) for row in rows(tmp_path)] == [None, 0]
    assert math.isnan(result.history[0]["share"])


def test_rows_that_a_kill_cut_off_or_that_the_checkpoint_does_not_know_come_again(half, whole):
    run(half, Follow(at_step=interrupt_at(4)))
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 12, "lo')
    run(half)
    assert rows(half) == rows(whole)


def test_averages_of_buffers_follow_those_of_weights(tmp_path):
    seen = []
    method = Follow(at_step=lambda step, losses: seen.append(method.student[1].running_mean.clone()))
    method.student[1].register_buffer("mask", torch.tensor([0.0, -math.inf]))
    average = method.student[1].running_mean.clone().double()
    result = run(tmp_path, method, steps=30, ema_decay=0.6)
    for step, value in enumerate(seen):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(result.ema[1].running_mean.double(), average, rtol=1e-5, atol=1e-6)
    assert result.ema[1].running_mean.abs().max() > 0.1 and int(result.ema[1].num_batches_tracked) == 30
    assert torch.equal(result.ema[1].mask, method.student[1].mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pull": 0.25}, "pull=0.5, now 0.25"), ({"hops": (4, 64)}, r"hops=\[4, 32\], now \[4, 64\]")],
)
def test_other_settings_of_the_method_do_not_resume(half, change, message):
    with pytest.raises(ValueError, match=f"was trained with {message}; use the same settings"):
        run(half, Follow(**change))
    assert run(half, Follow(limit=8.0)).finished  # a limit of an alarm decides over no weight


def test_another_method_does_not_resume(half):
    class Other(Follow):
        pass

    with pytest.raises(ValueError, match=r"was trained with class=Follow, now .*Other"):
        run(half, Other())


@dataclass
class Wrapped:
    model: nn.Module
    scale: float = math.inf
    values: Tensor = field(default_factory=lambda: torch.ones(2))


@dataclass
class Holder:
    teacher: Wrapped
    name: str = "x"
    made: int = field(default=3, init=False)


def test_settings_and_networks_are_read_off_the_fields():
    method = Holder(Wrapped(nn.Linear(2, 3)))
    assert settings_of(method) == {"class": "Holder", "teacher.scale": "inf", "name": "x"}
    assert networks_of(method) == {"teacher.model": method.teacher.model}
    assert first_difference({"a": 1}, {"a": 1}) is None and first_difference({"a": 1}, {}) == ("a", 1, None)


def test_settings_change_by_name_and_keep_their_kind():
    @dataclass(frozen=True)
    class Part:
        weight: float = 1.0

    @dataclass(frozen=True)
    class Whole:
        hops: tuple[int, int] = (4, 32)
        name: str = "huber"
        own: bool = False
        limit: float | None = None
        part: Part = Part()

    found = changed(Whole(), {"hops": "(4, 64)", "name": "squared", "own": "True", "limit": "2", "part.weight": 3})
    assert found == Whole((4, 64), "squared", True, 2, Part(3.0)) and changed(found, {}) is found
    for name, value, message in (
        ("hops", "4", "hops must be of the kind of"),
        ("part.weigth", 1, "no setting 'weigth'; there are weight"),
        ("own", 1, "own must be of the kind of False, got 1"),
        ("name.x", 1, "there is no setting 'x'; there are none"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(Whole(), {name: value})


def test_what_is_kept_needs_a_name_of_its_own(tmp_path):
    class Clash(Follow):
        @property
        def kept(self) -> dict[str, nn.Module]:
            return {"ema": self.slow}

    with pytest.raises(ValueError, match="'ema' in `kept` is the name of something that is saved anyway"):
        run(tmp_path, Clash())


def test_two_runs_in_one_folder(tmp_path):
    with folder_lock(tmp_path, "training"), pytest.raises(FolderInUseError, match=f"by process {os.getpid()} on"):
        run(tmp_path)
    assert run(tmp_path).finished
    assert ".training.lock" not in os.listdir(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_tells_the_command_how_it_ended(tmp_path, number):
    result = run(tmp_path, Follow(at_step=interrupt_at(2, number)))
    assert (result.step, result.finished, result.signal, result.exit_status) == (3, False, number, 128 + number)
    assert run(tmp_path).exit_status == 0


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path, Follow(at_step=interrupt_at(2, signal.SIGHUP))).finished
    finally:
        signal.signal(signal.SIGHUP, before)


def test_checkpoints_may_come_after_each_step_and_never_before_the_last(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint_seconds must be 0 or more, got -1"):
        TrainConfig(steps=1, checkpoint_seconds=-1)


@pytest.mark.slow
def test_a_killed_run_holds_no_lock(tmp_path):
    program = (
        "import sys, os; sys.path.insert(0, sys.argv[2]); import test_faults as t; from pathlib import Path;"
        "t.run(Path(sys.argv[1]), t.Follow(at_step=lambda s, l: os.kill(os.getpid(), 9) if s == 4 else None),"
        "      checkpoint_seconds=0)"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(folder)], cwd=folder.parents[1])
    assert done.returncode == -signal.SIGKILL and (tmp_path / ".training.lock").is_file()
    assert run(tmp_path).finished
