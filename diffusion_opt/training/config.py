"""How long and how fast to train: the options of a run, and what follows from them alone.

The batch of step k is cut into M micro-batches, `accumulate`. Micro-batch m draws everything from a generator seeded by
(seed, k, m), and the gradient is the mean over all M. How many processes share them is not part of that: two processes
with M / 2 each, or one with all, make the same step up to the order of a sum. M = 1 is the plain case.

Minutes can be counted by the clock on the wall or in CPU time of the process. The second is the fair one for methods
compared on a machine that others use too: it stands still while the process waits.

Matrix products can run in bfloat16 (autocast of torch). That is the rule on GPUs and pays on CPUs with AMX units; on
CPUs without, bfloat16 is many times slower than float32.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

SAME_TO_RESUME = (
    "batch_size", "learning_rate", "warmup_steps", "decay_fraction", "betas", "clip_norm", "ema_decay", "seed", "clock",
    "precision",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast to train. One of `steps` and `minutes` is the budget; with both, the first one reached."""

    steps: int | None = None  # optimizer steps in all; repeatable to the bit
    minutes: float | None = None  # training time in all, resumed runs included
    clock: Literal["wall", "process"] = "wall"  # what minutes count; "process": CPU time, summed over threads
    batch_size: int = 64  # images per step, over all processes
    accumulate: int | None = None  # micro-batches per step, over all processes; None: one for each process
    sharded: tuple[str, ...] = ()  # roles whose networks several processes share (FSDP2); the others each hold whole
    learning_rate: float = 1e-3  # peak of AdamW; warm-up, constant, then linear decay over the last part
    warmup_steps: int = 100
    decay_fraction: float = 0.4  # share of the budget over which the rate falls to 5 % of the peak
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0  # gradient norm
    ema_decay: float = 0.999
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights and sums stay in float32
    seed: int = 0
    checkpoint_seconds: float = 60.0  # wall time between two checkpoints; 0: after each step
    log_every: int = 50  # steps

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("give a budget: steps=<number> (repeatable), minutes=<number>, or both")
        for name in ("steps", "minutes", "batch_size", "accumulate", "learning_rate", "clip_norm", "log_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.checkpoint_seconds < 0:
            raise ValueError(f"checkpoint_seconds must be 0 or more, got {self.checkpoint_seconds}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.clock not in ("wall", "process"):
            raise ValueError(f"clock must be 'wall' or 'process', got {self.clock!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")

    def now(self) -> float:
        """Seconds on the run's clock, from an arbitrary start."""
        return time.process_time() if self.clock == "process" else time.perf_counter()

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


def shared_micro_batches(batch_size: int, micro_batches: int, world_size: int) -> int:
    """Micro-batches of each process. Raises ValueError if batch or processes do not divide evenly."""
    if batch_size % micro_batches:
        raise ValueError(f"batch_size={batch_size} cannot be cut into {micro_batches} equal micro-batches")
    if micro_batches % world_size:
        raise ValueError(
            f"{micro_batches} micro-batches per step cannot be shared evenly by {world_size} processes; start a run "
            f"with accumulate=<a multiple of {world_size}>, or use a number of processes that divides {micro_batches}"
        )
    return micro_batches // world_size


def step_generator(seed: int, step: int, device: torch.device | str = "cpu", micro_batch: int = 0) -> torch.Generator:
    """The random generator of a micro-batch: a function of (seed, step, micro-batch) and of nothing else."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step + micro_batch * 2_654_435_761) % 2**63)
