"""One readable training loop for teachers and students.

A `Distiller` says what is trained and what the loss is; the loop does the rest: learning-rate schedule, gradient
clipping, EMA, metrics (JSONL and TensorBoard), progress with images per second and time left, checkpoints, a clean
stop on a signal or when the time is up, and resume. It is the same loop for one process and many (`distributed.py`).

Resume is exact by construction: all randomness of step k comes from generators seeded by (seed, k), and the learning
rate is a function of k alone, so no random state needs saving and a run interrupted at any step and resumed gives the
same weights, bit for bit, on one machine. (With `minutes` as the budget instead of `steps` the schedule follows the
clock: still resumable, but not repeatable.)

Exponential moving averages follow Karras et al. 2022 (arXiv 2206.00364): weights <- lerp(weights, new, 1 - decay) with
a decay that starts low, min(decay, (1 + k) / (10 + k)), so that the average forgets its random start. The average of a
sharded network is sharded in the same way. Buffers are averaged too: a shipped BatchNorm without its statistics would
be none.
"""

import copy
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion_opt.datasets.folder_lock import FolderInUseError, folder_lock
from diffusion_opt.training import checkpoint
from diffusion_opt.training.checkpoint import TrainState, trained
from diffusion_opt.training.config import TrainConfig, shared_micro_batches, step_generator
from diffusion_opt.training.distributed import Processes, is_sharded, local, processes, shard, whole
from diffusion_opt.training.interruption import stop_on_signal
from diffusion_opt.training.log import TrainingLog
from diffusion_opt.training.settings import not_finite, refuse_damaged, settings_of

ALARMED = 3  # exit status of a run that an alarm ended


@dataclass(frozen=True)
class Role:
    """A network in training. `rate` scales the run's learning rate for it.

    `rates` scales it further for parts of the network, by the beginnings of parameter names: {"head": 10.0} for a head
    that starts from nothing beside a network that is trained already. Raises ValueError for a part that is not there.
    """

    network: nn.Module
    rate: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.network.named_parameters()]
        for part in self.rates:
            if not any(_within(name, part) for name in names):
                raise ValueError(f"no parameter's name begins with {part!r}; there are {', '.join(names[:5])}, …")

    def groups(self) -> list[dict[str, Any]]:
        """The trained parameters as the optimizer takes them, in groups of one rate: `scale` is that of `rates`."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                scale = next((rate for part, rate in self.rates.items() if _within(name, part)), 1.0)
                groups.setdefault(scale, []).append(parameter)
        return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


class Distiller(Protocol):
    """What a method gives to the loop. It is a dataclass, so that a resumed run can compare its settings.

    A method may also have, and the loop then uses:

        alarm(step, values) -> str | None     sees the logged values of each step, the same on all processes, and says
                                              why the run should end early. A run that had ended so is asked again with
                                              no values when it is resumed
        progress(share)                       is told before each step what share of the budget is used
        stepped(turn)                         is called after each update: the place to change what is `kept`
        kept: dict[str, nn.Module]            modules beside the roles that belong into a checkpoint: the average of a
                                              network that a loss compares with, running statistics in buffers
        notes: dict[str, float]               numbers that belong there, such as the running averages of an alarm
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
    finished: bool  # False after a signal or an alarm
    history: list[dict]
    images: int = 0  # training images of all steps, whichever role they trained
    alarm: str | None = None  # why the run ended early
    signal: int = 0  # the signal that ended it early, 0 for none

    @property
    def exit_status(self) -> int:
        """For a command: 0 finished, 3 an alarm, 128 + the signal as shells have it (130 for Ctrl-C)."""
        if self.alarm is not None:
            return ALARMED
        return 0 if self.finished else 128 + (self.signal or signal.SIGINT)


class _Run:
    """A run in motion: the networks where they belong, and one step of them."""

    def __init__(self, distiller: Distiller, config: TrainConfig, out: Path, among: Processes) -> None:
        self.distiller, self.config, self.out, self.processes = distiller, config, out, among
        self.roles = dict(distiller.roles)
        self.shipped = next(iter(self.roles))
        self.settings = json.loads(json.dumps(settings_of(distiller)))
        folder = checkpoint.find(out, among)
        numbers = None if folder is None else checkpoint.read_numbers(folder, config, self.settings, among)
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
        optimizers = {name: _optimizer(role, config) for name, role in self.roles.items()}
        kept = dict(getattr(distiller, "kept", {}))
        if taken := kept.keys() & {"ema", *networks, *(f"{name}-optimizer" for name in networks)}:
            raise ValueError(f"{sorted(taken)[0]!r} in `kept` is the name of something that is saved anyway: rename it")
        self.state = TrainState(networks, optimizers, ema, micro_batches, kept)
        self.alarm: str | None = None
        self.pending: dict[str, list[float | None]] = {}
        if folder is not None:
            checkpoint.load(self.state, folder, numbers)
            self._recall(numbers)

    def _recall(self, numbers: dict[str, Any]) -> None:
        """Take what `save` told beside the tensors; say so if the budget has changed."""
        if (notes := getattr(self.distiller, "notes", None)) is not None:
            notes.clear()
            notes.update({name: float(value) for name, value in numbers.get("notes", {}).items()})
        self.alarm, self.pending = numbers.get("alarm"), numbers.get("log", {})
        budget = {name: numbers["config"].get(name) for name in ("steps", "minutes")}
        now = {name: getattr(self.config, name) for name in budget}
        if budget != now and self.processes.is_main:
            warnings.warn(
                f"{self.out} goes on with a budget of {_say(now)} after one of {_say(budget)}: learning rates follow "
                "the budget, so the result is not that of a run which had it from the start",
                stacklevel=4,
            )

    def save(self, log: TrainingLog) -> None:
        """Write a checkpoint; all processes call it together.

        Raises FloatingPointError if a weight in it is not finite; the last checkpoint then stays as it is.
        """
        saved = {**self.state.networks, **self.state.kept}
        damaged = next(((name, at) for name, one in saved.items() if (at := not_finite(one)) is not None), None)
        if self.processes.largest(float(damaged is not None))[0]:
            where = "" if damaged is None else f", first {damaged[1]!r} of the {damaged[0]}"
            raise FloatingPointError(
                f"weights are not finite after step {self.state.step}{where}; the last checkpoint in {self.out} is as "
                "it was. Lower the learning rate and start anew in another output folder"
            )
        notes = {name: str(float(value)) for name, value in getattr(self.distiller, "notes", {}).items()}
        told = {"method": self.settings, "notes": notes, "alarm": self.alarm, "log": log.state()}
        checkpoint.save(self.state, self.config, self.out, self.processes, told)

    def update(self) -> dict[str, float]:
        """One optimizer step of the role whose turn it is; returns the logged values."""
        config, state, turn = self.config, self.state, self.distiller.turn(self.state.step)
        role, optimizer = self.roles[turn], state.optimizers[turn]
        rate = role.rate * config.rate(state.step, config.progress(state.step, state.seconds))
        parameters = trained(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        values = self._gradients(turn, parameters)
        if not is_sharded(role.network):
            self.processes.average_gradients(parameters)
        norm = whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of the {turn} is not finite at step {state.step} (loss {values['loss']:g})"
            )
        optimizer.step()
        for other in state.optimizers.values():  # a loss may send gradients through networks whose turn it is not
            other.zero_grad(set_to_none=True)
        if turn == self.shipped:
            self._average(role.network)
        getattr(self.distiller, "stepped", lambda turn: None)(turn)
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

    def rescue(self, error: FloatingPointError, log: TrainingLog) -> FloatingPointError:
        """After a step that was not taken: save the weights as they are, if they are good; returns what to raise."""
        try:
            self.save(log)
        except FloatingPointError as damaged:
            return FloatingPointError(f"{error}: {damaged}")
        return FloatingPointError(
            f"{error}; lower the learning rate and start anew in another output folder. The weights before this step "
            f"are good and saved in {self.out / checkpoint.CHECKPOINT}"
        )

    @torch.no_grad()
    def _average(self, network: nn.Module) -> None:
        """Move the average towards the network; buffers of numbers are averaged as weights are, others copied."""
        state = self.state
        decay = min(self.config.ema_decay, (1 + state.ema_updates) / (10 + state.ema_updates))
        pairs = [(a, p) for a, p in zip(state.ema.parameters(), network.parameters(), strict=True) if p.requires_grad]
        torch._foreach_lerp_([local(a) for a, _ in pairs], [local(p) for _, p in pairs], 1 - decay)
        for average, buffer in zip(state.ema.buffers(), network.buffers(), strict=True):
            if average.is_floating_point():  # where they are equal they stay: a mask may hold infinity
                buffer = torch.where(average == buffer, average, average.lerp(buffer, 1 - decay))
            average.copy_(buffer)
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


def _optimizer(role: Role, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(role.groups(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True)


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters are of the right shape and take no memory."""
    empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def _say(budget: dict[str, float | None]) -> str:
    return " and ".join(f"{value:g} {name}" for name, value in budget.items() if value is not None)


@contextmanager
def alone(out: Path, among: Processes, work: str = "training") -> Iterator[None]:
    """Hold the folder for one kind of work: the first process takes the lock, all raise FolderInUseError without it."""
    with ExitStack() as stack:
        refusal = None
        if among.is_main:
            try:
                stack.enter_context(folder_lock(out, work))
            except FolderInUseError as error:
                refusal = error
        if among.largest(float(refusal is not None))[0]:
            raise refusal or FolderInUseError(f"{out} is in use by another run; the first process says by which")
        yield


def train(distiller: Distiller, config: TrainConfig, out: Path, progress: bool = True) -> TrainResult:
    """Train until the budget is used, resuming from `out` if it holds a checkpoint of this run.

    Writes `metrics.jsonl`, TensorBoard events and `checkpoint/` below `out`. Under torchrun all processes call it, in
    a `process_group()`, and the first one writes. Raises ValueError if `out` belongs to a run with other settings, the
    batch cannot be shared or a network holds NaN before the first step, CorruptFileError for a damaged checkpoint,
    FolderInUseError if another run works in `out`, FloatingPointError if the gradient stops being finite (the weights
    are saved as they were before that step), OSError if the disk is full (the last checkpoint stays).
    """
    among = processes()
    refuse_damaged(distiller)
    with alone(out, among):
        run = _Run(distiller, config, out, among)
        state = run.state
        writes = among.is_main
        log = TrainingLog(out, state.step, config.log_every, progress and writes, writes, run.pending)
        with stop_on_signal() as stop_asked, log:
            stopped = _loop(run, log, stop_asked)
            run.save(log)
        finished = config.progress(state.step, state.seconds) >= 1
        done = (state.step, state.seconds, finished, log.history, state.step * config.batch_size)
        return TrainResult(run.average(), *done, alarm=run.alarm, signal=0 if finished else stopped)


def _loop(run: _Run, log: TrainingLog, stop_asked: Callable[[], int]) -> int:
    """Steps until the budget, an alarm or a signal ends them; returns the number of the signal, 0 for none."""
    state, config, among, distiller = run.state, run.config, run.processes, run.distiller
    tell = getattr(distiller, "progress", lambda share: None)
    sound_alarm = getattr(distiller, "alarm", lambda step, values: None)
    run.alarm = None if run.alarm is None else sound_alarm(state.step, {})
    stop, last_save = 0, time.perf_counter()
    while (used := config.progress(state.step, state.seconds)) < 1 and not stop and run.alarm is None:
        start = config.now()
        tell(used)
        try:
            values = run.update()
        except FloatingPointError as error:
            raise run.rescue(error, log) from None
        seconds = state.seconds + config.now() - start
        overdue = time.perf_counter() - last_save > config.checkpoint_seconds
        state.seconds, stop, save_due = among.largest(seconds, stop_asked(), overdue)
        used = config.progress(state.step, state.seconds)
        log.add(state.step, state.seconds, used, config.batch_size, values)
        run.alarm = sound_alarm(state.step, values)
        if save_due:
            run.save(log)
            last_save = time.perf_counter()
    return int(stop)
