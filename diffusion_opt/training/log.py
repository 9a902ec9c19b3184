"""What a training run tells: a progress bar, `metrics.jsonl` and TensorBoard events, all from the same numbers.

Values are averaged between two rows. In a run with several networks a value appears only on the steps that train its
network; it is averaged over those. With several processes the values are those of all of them, and one writes.

TensorBoard is an extra of the package (`logs`); where it is not installed the two others remain.

`metrics.jsonl` is valid JSON, line by line, and tells one story: a run that is resumed first drops a line that a kill
cut off, and the rows of steps that the checkpoint does not know, which come again. What was averaged since the last
row is in the checkpoint, so the rows of a resumed run are those of an uninterrupted one. A value that is not finite is
`null` there, since JSON has no word for it, and a warning says at which step it appeared.
"""

import importlib.util
import json
import math
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from diffusion_opt.datasets.writing import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


def _curves(folder: Path, step: int) -> "SummaryWriter | None":
    """A writer of TensorBoard events from this step on; None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=step + 1)


class TrainingLog:
    """Collects the values of each step and writes a row every `every` steps; use it as a context manager.

    `pending` is what `state()` gave when the checkpoint of `step` was made.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        every: int,
        progress: bool,
        writes: bool = True,
        pending: dict[str, list[float | None]] | None = None,
    ) -> None:
        self.out, self.every, self.progress, self.writes, self.step = out, every, progress, writes, step
        self.history: list[dict] = []
        self._warned: set[str] = set()
        self._start(step)
        for name, values in (pending or {}).items():
            self._values[name] = [math.nan if value is None else value for value in values]

    def __enter__(self) -> Self:
        if self.writes:
            keep_rows(self.out / METRICS, self.step)
            self._writer = _curves(self.out / "tensorboard", self.step)
            self._file = (self.out / METRICS).open("a", encoding="utf-8")
        form = "{desc} {percentage:3.0f}% |{bar}| {postfix}"
        self._bar = tqdm(total=1000, desc=self.out.name, bar_format=form, disable=not self.progress)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self.writes:
            self._file.close()
            if self._writer is not None:
                self._writer.close()

    def _start(self, step: int) -> None:
        self._values: dict[str, list[float]] = {}
        self._since_step, self._since = step, time.perf_counter()

    def state(self) -> dict[str, list[float | None]]:
        """The values since the last row, as JSON can keep them: for the checkpoint."""
        return {name: [_json(value) for value in values] for name, values in self._values.items()}

    def add(self, step: int, seconds: float, used: float, batch_size: int, values: dict[str, float]) -> None:
        """Take the values of the step that brought the run to `step`; `used` is the share of the budget by now."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} is {value} at step {step}; the loss is finite and training goes on", stacklevel=2
                )
        self._bar.update(int(1000 * used) - self._bar.n)
        if step % self.every:
            return
        images = (step - self._since_step) * batch_size
        row = {"step": step, "seconds": round(seconds, 2)}
        row |= {name: sum(seen) / len(seen) for name, seen in self._values.items()}
        row["images_per_second"] = images / (time.perf_counter() - self._since)
        self.history.append(row)
        if self.writes:
            self._file.write(json.dumps({name: _json(value) for name, value in row.items()}, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in row.items() if self._writer is not None else ():
                self._writer.add_scalar(name, value, step)
        left = seconds / max(used, 1e-9) * (1 - used) / 60
        losses = ", ".join(f"{name} {row[name]:.4f}" for name in row if name.endswith("loss"))
        self._bar.set_postfix_str(f"step {step}, {losses}, {row['images_per_second']:.0f} img/s, {left:.1f} min left")
        self._start(step)


def keep_rows(path: Path, step: int) -> None:
    """Keep the whole rows up to a step; nothing is written if there are no others."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line for line in text.splitlines(keepends=True) if _is_row_until(line, step))
    if kept != text:
        write_text(path, kept)


def _is_row_until(line: str, step: int) -> bool:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError:
        return False
    return line.endswith("\n") and isinstance(row, dict) and row.get("step", math.inf) <= step


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
