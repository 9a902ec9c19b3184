"""One readable training loop for teachers and students.

A `Distiller` says what is trained and what the loss is; the loop does the rest: learning-rate schedule, gradient
clipping, EMA, metrics (JSONL and TensorBoard), progress with images per second and time left, checkpoints, a clean
stop on Ctrl-C or when the time is up, and resume. It is the same loop for one process and for many (`distributed.py`).

Resume is exact by construction: all randomness of step k comes from generators seeded by (seed, k), and the learning
rate is a function of k alone, so no random state needs saving and a run interrupted at any step and resumed gives the
same weights, bit for bit, on one machine. (With `minutes` as the budget instead of `steps` the schedule follows the
clock: still resumable, but not repeatable.)

Exponential moving averages follow Karras et al. 2022 (arXiv 2206.00364): weights <- lerp(weights, new, 1 - decay) with
a decay that starts low, min(decay, (1 + k) / (10 + k)), so that the average forgets its random start. The average of a
sharded network is sharded in the same way.
"""

import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion_opt.training import checkpoint
from diffusion_opt.training.checkpoint import TrainState
from diffusion_opt.training.config import TrainConfig, shared_micro_batches, step_generator
from diffusion_opt.training.distributed import Processes, is_sharded, local, processes, shard, whole
from diffusion_opt.training.log import TrainingLog


@dataclass(frozen=True)
class Role:
    """A network in training. `rate` scales the run's learning rate for it."""

    network: nn.Module
    rate: float = 1.0


class Distiller(Protocol):
    """What a method gives to the loop.

    A method may also have `alarm(step, values) -> str | None`: it sees the logged values of each step and says why the
    run should end early, if it should. Processes see the same values and so decide the same. And it may have
    `progress(share)`, which is told before each step what share of the budget is used.
    """

    roles: dict[str, Role]  # what is trained, by name; the average of the first one is what ships

    def turn(self, step: int) -> str:
        """Whose turn it is: the role that this step trains."""
        ...

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        """The losses of a (micro-)batch as named scalars; "loss" is minimized over the role `turn`, the rest logged."""
        ...


@dataclass
class TrainResult:
    """What a run did; `ema` is the averaged model, whole again if it was sharded (then of the first process alone)."""

    ema: nn.Module
    step: int
    seconds: float
    finished: bool  # False after Ctrl-C or an alarm
    history: list[dict]
    images: int = 0  # training images of all steps, whichever role they trained
    alarm: str | None = None  # why the run ended early


class _Run:
    """A run in motion: the networks where they belong, and one step of them."""

    def __init__(self, distiller: Distiller, config: TrainConfig, out: Path, among: Processes) -> None:
        self.distiller, self.config, self.out, self.processes = distiller, config, out, among
        self.roles = dict(distiller.roles)
        self.shipped = next(iter(self.roles))
        folder = checkpoint.find(out, among)
        numbers = None if folder is None else checkpoint.read_numbers(folder, config)
        micro_batches = (numbers or {}).get("micro_batches", 1 if numbers else config.accumulate or among.world_size)
        self.share = shared_micro_batches(config.batch_size, micro_batches, among.world_size)
        if unknown := set(config.sharded) - self.roles.keys():
            raise ValueError(f"sharded names {sorted(unknown)}; the roles of this method are {', '.join(self.roles)}")
        for name, role in self.roles.items():
            if is_sharded(role.network):
                raise ValueError(
                    f"the network of {name!r} is sharded already; hand it over whole, and name it in sharded="
                )
            among.same_start(role.network)
        self.plain = _without_weights(self.roles[self.shipped].network)
        ema = copy.deepcopy(self.roles[self.shipped].network).requires_grad_(False)
        for name in config.sharded:
            shard(self.roles[name].network)
        if self.shipped in config.sharded:
            shard(ema)
        networks = {name: role.network for name, role in self.roles.items()}
        optimizers = {name: _optimizer(network, config) for name, network in networks.items()}
        self.state = TrainState(networks, optimizers, ema, micro_batches)
        if folder is not None:
            checkpoint.load(self.state, folder, numbers)

    def save(self) -> None:
        checkpoint.save(self.state, self.config, self.out, self.processes)

    def update(self) -> dict[str, float]:
        """One optimizer step of the role whose turn it is; returns the logged values."""
        config, state, turn = self.config, self.state, self.distiller.turn(self.state.step)
        role, optimizer = self.roles[turn], state.optimizers[turn]
        rate = role.rate * config.rate(state.step, config.progress(state.step, state.seconds))
        parameters = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["lr"] = rate
        values = self._gradients(turn, parameters)
        if not is_sharded(role.network):
            self.processes.average_gradients(parameters)
        norm = whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of the {turn} is not finite at step {state.step} (loss {values['loss']:g}); "
                "lower the learning rate and start anew in another output folder"
            )
        optimizer.step()
        for other in state.optimizers.values():  # a loss may send gradients through networks whose turn it is not
            other.zero_grad(set_to_none=True)
        if turn == self.shipped:
            self._average(role.network)
        state.step += 1
        values |= {"gradient_norm": norm.item()}
        prefix = "" if turn == self.shipped else f"{turn}_"
        return {prefix + name: value for name, value in values.items()} | {f"{prefix}learning_rate": rate}

    def _gradients(self, turn: str, parameters: list[nn.Parameter]) -> dict[str, float]:
        """Backward through this process's micro-batches; returns the mean values over those of all processes."""
        config, state, sums = self.config, self.state, {}
        for index in range(self.share):
            number = self.processes.rank * self.share + index
            generator = step_generator(config.seed, state.step, parameters[0].device, number)
            with torch.autocast(generator.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses = self.distiller.losses(generator, config.batch_size // state.micro_batches, turn)
            (losses["loss"] / self.share).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        return self.processes.mean({name: value / self.share for name, value in sums.items()})

    @torch.no_grad()
    def _average(self, network: nn.Module) -> None:
        state = self.state
        decay = min(self.config.ema_decay, (1 + state.ema_updates) / (10 + state.ema_updates))
        trained = [(a, p) for a, p in zip(state.ema.parameters(), network.parameters(), strict=True) if p.requires_grad]
        torch._foreach_lerp_([local(a) for a, _ in trained], [local(p) for _, p in trained], 1 - decay)
        state.ema_updates += 1

    def average(self) -> nn.Module:
        """The averaged network, whole."""
        if not is_sharded(self.state.ema):
            return self.state.ema
        for name, tensor in self.state.ema.state_dict().items():
            gathered = whole(tensor)
            if self.processes.is_main:
                self.plain.load_state_dict({name: gathered.cpu()}, strict=False, assign=True)
        return self.plain.requires_grad_(False)


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True)


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters are of the right shape and take no memory."""
    empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, empty)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C (or SIGTERM) finish the step and save; a second one interrupts at once."""
    asked = False

    def ask(signum, frame) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: Ctrl-C goes elsewhere anyway
        previous = {}
    try:
        yield lambda: asked
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def train(distiller: Distiller, config: TrainConfig, out: Path, progress: bool = True) -> TrainResult:
    """Train until the budget is used, resuming from `out` if it holds a checkpoint of this run.

    Writes `metrics.jsonl`, TensorBoard events and `checkpoint/` below `out`. Under torchrun all processes call it, in
    a `process_group()`, and the first one writes. Raises ValueError if `out` belongs to a run with other settings or
    the batch cannot be shared, FloatingPointError if the gradient stops being finite.
    """
    among = processes()
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(distiller, config, out, among)
    state, tell = run.state, getattr(distiller, "progress", lambda share: None)
    sound_alarm = getattr(distiller, "alarm", lambda step, values: None)
    stop, save_due, reason, last_save = False, False, None, time.perf_counter()
    log = TrainingLog(out, state.step, config.log_every, progress and among.is_main, writes=among.is_main)
    with _stop_on_interrupt() as stop_asked, log:
        while (used := config.progress(state.step, state.seconds)) < 1 and not stop and reason is None:
            start = config.now()
            tell(used)
            values = run.update()
            seconds = state.seconds + config.now() - start
            overdue = time.perf_counter() - last_save > config.checkpoint_seconds
            state.seconds, stop, save_due = among.largest(seconds, stop_asked(), overdue)
            used = config.progress(state.step, state.seconds)
            log.add(state.step, state.seconds, used, config.batch_size, values)
            reason = sound_alarm(state.step, values)
            if save_due:
                run.save()
                last_save = time.perf_counter()
        run.save()
    finished = config.progress(state.step, state.seconds) >= 1
    images = state.step * config.batch_size
    return TrainResult(run.average(), state.step, state.seconds, finished, log.history, images, reason)
