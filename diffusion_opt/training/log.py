"""What a training run tells: a progress bar, `metrics.jsonl` and TensorBoard events, all from the same numbers.

Values are averaged between two rows. In a run with several networks a value appears only on the steps that train its
network; it is averaged over those. With several processes the values are those of all of them, and one writes.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm


class TrainingLog:
    """Collects the values of each step and writes a row every `every` steps; use it as a context manager."""

    def __init__(self, out: Path, step: int, every: int, progress: bool, writes: bool = True) -> None:
        self.out, self.every, self.progress, self.writes = out, every, progress, writes
        self.history: list[dict] = []
        self._start(step)

    def __enter__(self) -> Self:
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.out / "tensorboard")
            self._file = (self.out / "metrics.jsonl").open("a")
        form = "{desc} {percentage:3.0f}% |{bar}| {postfix}"
        self._bar = tqdm(total=1000, desc=self.out.name, bar_format=form, disable=not self.progress)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self.writes:
            self._file.close()
            self._writer.close()

    def _start(self, step: int) -> None:
        self._values: dict[str, list[float]] = {}
        self._since_step, self._since = step, time.perf_counter()

    def add(self, step: int, seconds: float, used: float, batch_size: int, values: dict[str, float]) -> None:
        """Take the values of the step that brought the run to `step`; `used` is the share of the budget by now."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        self._bar.update(int(1000 * used) - self._bar.n)
        if step % self.every:
            return
        images = (step - self._since_step) * batch_size
        row = {"step": step, "seconds": round(seconds, 2)}
        row |= {name: sum(seen) / len(seen) for name, seen in self._values.items()}
        row["images_per_second"] = images / (time.perf_counter() - self._since)
        self.history.append(row)
        if self.writes:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for name, value in row.items():
                self._writer.add_scalar(name, value, step)
        left = seconds / max(used, 1e-9) * (1 - used) / 60
        losses = ", ".join(f"{name} {row[name]:.4f}" for name in row if name.endswith("loss"))
        self._bar.set_postfix_str(f"step {step}, {losses}, {row['images_per_second']:.0f} img/s, {left:.1f} min left")
        self._start(step)
