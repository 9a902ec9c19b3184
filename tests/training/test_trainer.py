"""The loop keeps its promises: exact resume, safe checkpoints, a clean stop, the averages and rates it announces."""

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_opt.training import Role, TrainConfig, TrainResult, checkpoint, config, step_generator, train

SETTINGS = {"batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_seconds": 1e9, "log_every": 2}


class Regression:
    """Learn y = sin(3 x) from random points; `at_step` may do something to the loss of a given step."""

    def __init__(
        self, at_step: Callable[[int, Tensor], Tensor | None] = lambda step, loss: None, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 1))
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.at_step, self.calls = at_step, 0

    @property
    def roles(self) -> dict[str, Role]:
        return {"model": Role(self.model)}

    def turn(self, step: int) -> str:
        return "model"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        x = torch.rand(batch_size, 1, generator=generator)
        error = self.model(x) - (3 * x).sin()
        loss = error.square().mean()
        changed = self.at_step(self.calls, loss)
        self.calls += 1
        return {"loss": loss if changed is None else changed, "absolute": error.abs().mean()}


def run(out: Path, distiller: Regression | None = None, **settings) -> TrainResult:
    return train(distiller or Regression(), TrainConfig(**SETTINGS | {"steps": 6} | settings), out, progress=False)


def weights(out: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: weights, their average, the optimizer's moments."""
    folder = out / "checkpoint"
    files = {p.stem: load_file(p) for p in folder.glob("*.safetensors")}
    assert files.keys() == {"model", "ema", "model-optimizer"}
    return {f"{stem}.{name}": value for stem, tensors in files.items() for name, value in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupt_at(step: int) -> Callable[[int, Tensor], None]:
    """Press Ctrl-C while the loss of a step is computed."""
    return lambda now, loss: os.kill(os.getpid(), signal.SIGINT) if now == step else None


def test_the_same_command_twice_gives_the_same_numbers(tmp_path):
    one, two, other = (run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    assert one.finished and one.step == 6
    assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    assert [row["loss"] for row in one.history] != [row["loss"] for row in other.history]


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path, stop):
    whole = run(tmp_path / "whole")
    first = run(tmp_path / "parts", Regression(interrupt_at(stop)))
    assert (first.finished, first.step) == (False, stop + 1)
    fresh = Regression(seed=5)  # other weights to start from: all must come from the checkpoint
    second = run(tmp_path / "parts", fresh)
    assert (second.finished, second.step, fresh.calls) == (True, 6, 5 - stop)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert same(second.ema.state_dict(), whole.ema.state_dict())


def test_interrupt_leaves_the_signal_handlers_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path, Regression(interrupt_at(1)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_stops_at_once_and_the_last_checkpoint_stays(tmp_path):
    run(tmp_path, Regression(interrupt_at(1)))
    before = weights(tmp_path)

    def twice(step: int, loss: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Regression(twice))
    assert same(weights(tmp_path), before)


def test_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].finished


class Crash(Exception):
    pass


@pytest.mark.parametrize("moves", [0, 1])
def test_a_crash_while_the_checkpoint_is_swapped_loses_nothing(tmp_path, monkeypatch, moves):
    """`moves` renames of the second checkpoint still happen: none (the old one stands) or one (neither stands)."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", Regression(interrupt_at(1)))
    done = []

    def replace(source, target) -> None:
        if os.path.isdir(source):  # a checkpoint, not one of its files
            if len(done) == moves:
                raise Crash
            done.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(Crash):
            run(tmp_path / "parts", Regression(interrupt_at(1)))
    assert (tmp_path / "parts" / "checkpoint").is_dir() == (moves == 0)
    again = Regression()
    result = run(tmp_path / "parts", again)
    assert again.calls == (4 if moves == 0 else 2)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert same(result.ema.state_dict(), whole.ema.state_dict())
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint", "metrics.jsonl", "tensorboard"]


def test_a_crash_while_the_new_checkpoint_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    run(tmp_path, Regression(interrupt_at(2)))
    before = weights(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "asdict", lambda _: pytest.fail("disk full"))
        with pytest.raises(BaseException, match="disk full"):
            train(Regression(), TrainConfig(**SETTINGS, steps=6), tmp_path, progress=False)
    assert same(weights(tmp_path), before)


def test_checkpoints_are_also_made_on_the_way(tmp_path):
    def crash(step: int, loss: Tensor) -> None:
        if step == 4:
            raise Crash

    with pytest.raises(Crash):
        run(tmp_path, Regression(crash), checkpoint_seconds=1e-9)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 16), ("learning_rate", 0.1), ("seed", 1), ("ema_decay", 0.5), ("betas", (0.5, 0.9)),
     ("clip_norm", 2.0), ("warmup_steps", 3), ("decay_fraction", 0.5)],
)  # fmt: skip
def test_other_settings_do_not_resume(tmp_path, name, value):
    run(tmp_path, Regression(interrupt_at(1)))
    with pytest.raises(ValueError, match=rf"was trained with {name}=.*, now .*; use the same settings to resume"):
        run(tmp_path, **{name: value})


def test_a_finished_run_does_nothing_more_and_a_larger_budget_goes_on(tmp_path):
    run(tmp_path)
    before = weights(tmp_path)
    idle = Regression()
    assert run(tmp_path, idle).finished and idle.calls == 0 and same(weights(tmp_path), before)
    more = Regression()
    with pytest.warns(UserWarning, match="goes on with a budget of 9 steps after one of 6 steps: learning"):
        assert run(tmp_path, more, steps=9).step == 9
    assert more.calls == 3


def test_minutes_are_a_budget_that_counts_all_sessions(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(config.time, "perf_counter", lambda: float(next(clock)))  # each look at it is one second later
    first = run(tmp_path, steps=None, minutes=4 / 60)
    assert (first.finished, first.step, first.seconds) == (True, 4, 4.0)
    second = run(tmp_path, steps=None, minutes=7 / 60)
    assert (second.finished, second.step, second.seconds) == (True, 7, 7.0)
    both = run(tmp_path, steps=8, minutes=60)
    assert (both.finished, both.step) == (True, 8)


@pytest.mark.parametrize(("steps", "ema_decay"), [(30, 0.6), (5, 0.999)])
def test_average_follows_its_formula(tmp_path, steps, ema_decay):
    seen = []
    distiller = Regression(lambda step, loss: seen.append([p.detach().clone() for p in distiller.model.parameters()]))
    result = run(tmp_path, distiller, steps=steps, ema_decay=ema_decay)
    seen.append([p.detach().clone() for p in distiller.model.parameters()])
    average = [p.double() for p in seen[0]]
    for step, current in enumerate(seen[1:]):
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p for a, p in zip(average, current, strict=True)]
    for found, expected, last in zip(result.ema.parameters(), average, seen[-1], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, last, atol=1e-4)
        assert not found.requires_grad


def test_only_trainable_weights_move(tmp_path):
    distiller = Regression()
    distiller.model[0].weight.requires_grad_(False)
    before = distiller.model[0].weight.clone(), distiller.model[2].weight.clone()
    result = run(tmp_path, distiller)
    assert torch.equal(distiller.model[0].weight, before[0]) and torch.equal(result.ema[0].weight, before[0])
    assert not torch.equal(distiller.model[2].weight, before[1])


def test_learning_rate_warms_up_stays_and_falls():
    config = TrainConfig(steps=1000, learning_rate=2.0, warmup_steps=10, decay_fraction=0.4)
    rates = [config.rate(step, config.progress(step, 0.0)) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert set(rates[9:600]) == {2.0}
    assert rates[800] == pytest.approx(1.0) and rates[999] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[600:]))


def test_the_rate_of_the_schedule_is_the_one_used(tmp_path):
    result = run(tmp_path, log_every=1)
    config = TrainConfig(**SETTINGS, steps=6)
    expected = [config.rate(step, config.progress(step, 0.0)) for step in range(6)]
    assert [row["learning_rate"] for row in result.history] == pytest.approx(expected)
    moments = load_file(tmp_path / "checkpoint" / "model-optimizer.safetensors")
    assert {float(v) for k, v in moments.items() if k.endswith("step")} == {6.0}


def test_progress_is_the_budget_that_is_nearer_to_its_end():
    config = TrainConfig(steps=10, minutes=1)
    assert config.progress(5, 6.0) == 0.5 and config.progress(1, 30.0) == 0.5 and config.progress(20, 0.0) == 1.0


def test_gradients_are_clipped_and_their_norm_before_is_logged(tmp_path):
    huge = Regression(lambda step, loss: loss * 1e6)
    result = run(tmp_path, huge, log_every=1)
    assert all(row["gradient_norm"] > 1e3 for row in result.history)
    moments = load_file(tmp_path / "checkpoint" / "model-optimizer.safetensors")
    first = torch.cat([v.flatten() for k, v in moments.items() if k.endswith("exp_avg")])
    assert 0 < first.norm() <= 1.0


def test_metrics_are_means_since_the_last_line_and_lines_accumulate(tmp_path):
    losses = []
    run(tmp_path, Regression(lambda step, loss: losses.append(loss.item())))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["loss"] for row in rows] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert rows[0].keys() == {
        "step", "seconds", "loss", "absolute", "gradient_norm", "learning_rate", "images_per_second"
    }  # fmt: skip
    run(tmp_path, steps=8)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


def test_no_pickle_is_written(tmp_path):
    run(tmp_path)
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    (events,) = [name for name in files if "tfevents" in name]
    files.remove(events)
    names = ("ema.safetensors", "model-optimizer.safetensors", "model.safetensors", "state.json")
    assert sorted(files) == [*(f"checkpoint/{name}" for name in names), "metrics.jsonl"]


def test_progress_bar_shows_loss_speed_and_time_left(tmp_path, capsys):
    train(Regression(), TrainConfig(**SETTINGS, steps=6), tmp_path / "sine")
    assert "sine" in (shown := capsys.readouterr().err)
    assert "loss" in shown and "img/s" in shown and "min left" in shown


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone():
    draws = {(s, k): torch.rand(3, generator=step_generator(s, k)).tolist() for s in range(3) for k in range(50)}
    assert draws[2, 7] == torch.rand(3, generator=step_generator(2, 7)).tolist()
    assert len({tuple(d) for d in draws.values()}) == 150


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give a budget"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"minutes": -1.0}, "minutes must be positive, got -1.0"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be positive"),
        ({"steps": 1, "accumulate": 0}, "accumulate must be positive"),
        ({"steps": 1, "ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_minutes_of_the_process_stand_still_while_it_waits(tmp_path):
    def wait(step: int, loss: Tensor) -> None:
        time.sleep(0.05)

    waiting = run(tmp_path / "wall", Regression(wait), steps=None, minutes=0.2 / 60)
    working = run(tmp_path / "process", Regression(wait), steps=8, minutes=1.0, clock="process")
    assert waiting.step <= 4 and waiting.seconds >= 0.2
    assert working.step == 8 and working.seconds < 0.3


@pytest.mark.parametrize(("then", "now"), [({}, {"accumulate": 2}), ({"accumulate": 4}, {"accumulate": 2})])
def test_another_number_of_micro_batches_does_not_resume(tmp_path, then, now):
    run(tmp_path, Regression(interrupt_at(1)), **then)
    expected = f"accumulate={then.get('accumulate', 1)}, now 2"
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, **now)
    assert run(tmp_path).finished  # without a number it takes that of the run


def test_micro_batches_of_a_step_are_different(tmp_path):
    first = [torch.rand(2, generator=step_generator(0, 3, "cpu", index)).tolist() for index in range(20)]
    assert len({tuple(draw) for draw in first}) == 20
    assert first[0] == torch.rand(2, generator=step_generator(0, 3)).tolist()
    method = Regression()
    result = run(tmp_path, method, accumulate=4)
    assert (method.calls, result.step, result.images) == (24, 6, 48)


def test_an_alarm_ends_the_run_with_its_reason_and_the_weights_are_kept(tmp_path):
    class Alarmed(Regression):
        def alarm(self, step: int, values: dict[str, float]) -> str | None:
            assert values.keys() >= {"loss", "absolute", "gradient_norm"} or not values
            return "the loss did not fall" if step == limit else None

    limit = 3
    result = run(tmp_path, Alarmed())
    assert (result.step, result.finished, result.alarm) == (3, False, "the loss did not fall")
    assert result.exit_status == 3
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 3
    again = Alarmed()
    assert run(tmp_path, again).alarm == "the loss did not fall" and again.calls == 0  # it makes no more steps
    limit = 100
    calm = run(tmp_path, Alarmed())
    assert calm.finished and calm.alarm is None and calm.exit_status == 0


def test_a_method_that_asks_is_told_the_share_of_the_budget_that_is_used(tmp_path):
    class Curious(Regression):
        def __init__(self) -> None:
            super().__init__(interrupt_at(1))
            self.shares = []

        def progress(self, share: float) -> None:
            self.shares.append(share)

    first, second = Curious(), Curious()
    second.at_step = lambda step, loss: None
    run(tmp_path, first, steps=5)
    run(tmp_path, second, steps=5)
    assert first.shares + second.shares == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_a_checkpoint_from_before_there_were_clocks_and_micro_batches_resumes(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", Regression(interrupt_at(2)))
    path = tmp_path / "parts" / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    del state["micro_batches"], state["config"]["clock"], state["config"]["accumulate"]
    for later in ("digest", "files", "method", "notes", "alarm", "log"):
        del state[later]
    path.write_text(json.dumps(state))
    second = run(tmp_path / "parts", Regression(seed=5))
    assert same(second.ema.state_dict(), whole.ema.state_dict())


def test_gradients_that_a_loss_sends_elsewhere_are_forgotten(tmp_path):
    """A loss of one role may run through another one's network (as score identity does); that must leave no trace."""

    class Two(Regression):
        other = None

        @property
        def roles(self) -> dict[str, Role]:
            self.other = self.other or Regression(seed=1).model
            return {"model": Role(self.model), "other": Role(self.other)}

        def turn(self, step: int) -> str:
            return ("model", "other")[step % 2]

        def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
            x = torch.rand(batch_size, 1, generator=generator)
            if turn == "other":
                return {"loss": self.other(x).square().mean()}
            frozen = self.other if self.through else copy.deepcopy(self.other)
            return {"loss": (self.model(x) - frozen(x)).square().mean()}

    seen = []
    for through in (True, False):
        method = Two()
        method.through = through
        run(tmp_path / str(through), method)
        seen.append(method.other.state_dict())
    assert same(*seen)


def test_a_role_to_shard_must_be_one_of_the_method(tmp_path):
    with pytest.raises(ValueError, match=r"sharded names \['teacher'\]; the roles of this method are model"):
        run(tmp_path, sharded=("teacher",))
    assert run(tmp_path, sharded=("model",)).finished  # alone there is nobody to share with


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run(tmp_path, Regression(interrupt_at(1)))
    wider = Regression()
    wider.model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"ema.safetensors: '0.weight' is \(7, 1\), the network's \(8, 1\)"):
        run(tmp_path, wider)
    deeper = Regression()
    deeper.model.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"does not fit this network: it lacks '3.bias'"):
        run(tmp_path, deeper)


def test_parts_of_a_role_may_have_rates_of_their_own_and_resume_with_them(tmp_path):
    """AdamW's first step is the rate times the sign of the gradient, whatever its size."""

    class TwoRates(Regression):
        @property
        def roles(self) -> dict[str, Role]:
            return {"model": Role(self.model, rate=0.5, rates={"2": 10.0})}

    method = TwoRates()
    before = copy.deepcopy(method.model)
    run(tmp_path / "a", method, steps=1, warmup_steps=0, clip_norm=1e9, decay_fraction=0.01)
    moved = [(a - b).abs().max().item() for a, b in zip(method.model.parameters(), before.parameters(), strict=True)]
    assert moved == pytest.approx([5e-3, 5e-3, 5e-2, 5e-2], rel=1e-3)
    run(tmp_path / "whole", TwoRates())
    parts = TwoRates()
    parts.at_step = interrupt_at(2)
    run(tmp_path / "parts", parts)
    run(tmp_path / "parts", TwoRates(seed=5))
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"no parameter's name begins with 'head'; there are 0\.weight, 0\.bias"):
        Role(method.model, rates={"head": 2.0})


@pytest.mark.wrong_shapes
def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="clock must be 'wall' or 'process', got 'sun'"):
        TrainConfig(steps=1, clock="sun")
