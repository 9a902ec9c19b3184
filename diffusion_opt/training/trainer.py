"""One readable training loop for teachers and students.

A `Distiller` says what is trained and what the loss is; the loop does the rest: learning-rate schedule, gradient
clipping, EMA, metrics (JSONL and TensorBoard), progress with images per second and time left, checkpoints, a clean
stop on Ctrl-C or when the time is up, and resume.

Resume is exact by construction: all randomness of step k comes from a generator seeded by (seed, k), and the learning
rate is a function of k alone, so no random state needs saving and a run interrupted at any step and resumed gives the
same weights, bit for bit, on one machine. (With `minutes` as the budget instead of `steps` the schedule follows the
clock: still resumable, but not repeatable.) Checkpoints are safetensors plus JSON, written beside the old one and then
swapped in, so that a crash while saving loses nothing.

Exponential moving averages follow Karras et al. 2022 (arXiv 2206.00364): weights <- lerp(weights, new, 1 - decay) with
a decay that starts low, min(decay, (1 + k) / (10 + k)), so that the average forgets its random start.
"""

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_opt.training.log import TrainingLog

CHECKPOINT = "checkpoint"
SAME_TO_RESUME = ("batch_size", "learning_rate", "warmup_steps", "betas", "clip_norm", "ema_decay", "seed")


@dataclass(frozen=True)
class Role:
    """A network in training. `rate` scales the run's learning rate for it."""

    network: nn.Module
    rate: float = 1.0


class Distiller(Protocol):
    """What a method gives to the loop."""

    roles: dict[str, Role]  # what is trained, by name; the average of the first one is what ships

    def turn(self, step: int) -> str:
        """Whose turn it is: the role that this step trains."""
        ...

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        """The losses of one step as named scalars; "loss" is minimized over the role `turn`, the rest is logged."""
        ...


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast to train. One of `steps` and `minutes` is the budget; with both, the first one reached."""

    steps: int | None = None  # optimizer steps in all; repeatable to the bit
    minutes: float | None = None  # training time in all, resumed runs included
    batch_size: int = 64  # images a step
    learning_rate: float = 1e-3  # peak of AdamW; warm-up, constant, then linear decay over the last part
    warmup_steps: int = 100
    decay_fraction: float = 0.4  # share of the budget over which the rate falls to 5 % of the peak
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0  # gradient norm
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_seconds: float = 60.0
    log_every: int = 50  # steps

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("give a budget: steps=<number> (repeatable), minutes=<number>, or both")
        for name in ("steps", "minutes", "batch_size", "learning_rate", "clip_norm", "log_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, 0 … 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step, given the share of the budget used."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay = 1.0 if progress < 1 - self.decay_fraction else max(0.05, (1 - progress) / self.decay_fraction)
        return self.learning_rate * warmup * decay


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one step: a function of (seed, step) and of nothing else."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


@dataclass
class TrainResult:
    """What a run did; `ema` is the averaged model."""

    ema: nn.Module
    step: int
    seconds: float
    finished: bool  # False after Ctrl-C
    history: list[dict]


class _Run:
    """The mutable state of a run, and how it goes to disk and comes back."""

    def __init__(self, distiller: Distiller, config: TrainConfig, out: Path) -> None:
        self.distiller, self.config, self.out = distiller, config, out
        self.shipped = next(iter(distiller.roles))
        self.ema = copy.deepcopy(distiller.roles[self.shipped].network).requires_grad_(False)
        self.ema_updates = 0
        self.optimizers = {
            name: torch.optim.AdamW(
                [p for p in role.network.parameters() if p.requires_grad],
                lr=config.learning_rate,
                betas=config.betas,
                weight_decay=0.0,
                fused=True,
            )
            for name, role in distiller.roles.items()
        }
        self.step, self.seconds = 0, 0.0

    def save(self) -> None:
        """Write a checkpoint beside the last one, then put it in its place."""
        final, fresh, old = (self.out / f"{CHECKPOINT}{end}" for end in ("", ".new", ".old"))
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(_contiguous(self.ema.state_dict()), fresh / "ema.safetensors")
        for name, role in self.distiller.roles.items():
            save_file(_contiguous(role.network.state_dict()), fresh / f"{name}.safetensors")
            moments = {
                f"{index}.{key}": value
                for index, state in self.optimizers[name].state_dict()["state"].items()
                for key, value in state.items()
            }
            save_file(moments, fresh / f"{name}-optimizer.safetensors")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "ema_updates": self.ema_updates,
            "config": asdict(self.config),
        }
        (fresh / "state.json").write_text(json.dumps(state, indent=2))
        if final.is_dir():
            os.replace(final, old)
        os.replace(fresh, final)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self) -> bool:
        """Continue from the last checkpoint if there is one.

        Raises ValueError if it was made with settings that would make this another run.
        """
        folder = self.out / CHECKPOINT
        if not folder.is_dir() and (self.out / f"{CHECKPOINT}.new" / "state.json").is_file():
            os.replace(self.out / f"{CHECKPOINT}.new", folder)  # stopped between the two moves of `save`
        if not folder.is_dir():
            return False
        state = json.loads((folder / "state.json").read_text())
        now = json.loads(json.dumps(asdict(self.config)))  # as JSON keeps it: tuples are lists
        for name in SAME_TO_RESUME:
            if state["config"][name] != now[name]:
                raise ValueError(
                    f"{folder} was trained with {name}={state['config'][name]}, now {now[name]}; "
                    "use the same settings to resume, or another output folder to start anew"
                )
        self.ema.load_state_dict(load_file(folder / "ema.safetensors"))
        for name, role in self.distiller.roles.items():
            role.network.load_state_dict(load_file(folder / f"{name}.safetensors"))
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in load_file(folder / f"{name}-optimizer.safetensors").items():
                index, _, part = key.partition(".")
                moments.setdefault(int(index), {})[part] = value
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.seconds, self.ema_updates = state["step"], state["seconds"], state["ema_updates"]
        return True

    def update(self) -> dict[str, float]:
        """One optimizer step of the role whose turn it is; returns the logged values."""
        config, turn = self.config, self.distiller.turn(self.step)
        role, optimizer = self.distiller.roles[turn], self.optimizers[turn]
        rate = role.rate * config.rate(self.step, config.progress(self.step, self.seconds))
        parameters = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["lr"] = rate
        generator = step_generator(config.seed, self.step, parameters[0].device)
        losses = self.distiller.losses(generator, config.batch_size, turn)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of the {turn} is not finite at step {self.step} (loss {losses['loss'].item():g}); "
                "lower the learning rate and start anew in another output folder"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if turn == self.shipped:
            decay = min(config.ema_decay, (1 + self.ema_updates) / (10 + self.ema_updates))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(role.network.parameters()), 1 - decay)
            self.ema_updates += 1
        self.step += 1
        values = {name: value.item() for name, value in losses.items()} | {"gradient_norm": norm.item()}
        prefix = "" if turn == self.shipped else f"{turn}_"
        return {prefix + name: value for name, value in values.items()} | {f"{prefix}learning_rate": rate}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


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

    Writes `metrics.jsonl`, TensorBoard events and `checkpoint/` below `out`. Raises ValueError if `out` belongs to a
    run with other settings, FloatingPointError if the gradient stops being finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(distiller, config, out)
    run.resume()
    last_save = time.perf_counter()
    with _stop_on_interrupt() as stop_asked, TrainingLog(out, run.step, config.log_every, progress) as log:
        while (used := config.progress(run.step, run.seconds)) < 1 and not stop_asked():
            start = time.perf_counter()
            values = run.update()
            run.seconds += time.perf_counter() - start
            log.add(run.step, run.seconds, used, config.batch_size, values)
            if time.perf_counter() - last_save > config.checkpoint_seconds:
                run.save()
                last_save = time.perf_counter()
        run.save()
    finished = config.progress(run.step, run.seconds) >= 1
    return TrainResult(run.ema, run.step, run.seconds, finished, log.history)
