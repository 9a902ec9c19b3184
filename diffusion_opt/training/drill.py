"""The fault drill of a training run: it is killed, starved of disk, damaged and doubled, and must come out the same.

    python -m diffusion_opt.training.drill 200 50 <empty folder>       200 kills, 50 of each other fault; JSON

A tiny run with all that a run can have (two roles, a network and numbers kept beside them, an average, pending rows of
the log) makes a checkpoint after each step. Each disturbance happens in a process of its own, forked from this one, so
that the libraries are loaded once. Afterwards the same run is started again, undisturbed, and its checkpoint and its
`metrics.jsonl` (without the columns of the clock) are compared byte by byte with those of a run that nothing happened
to. What must be refused, a damaged checkpoint or a second run, must be refused by an error that names the file or the
other process.

A full disk is a real one where the system lets us mount it: a tmpfs of a random size in a namespace of the process. The
kernel's limit on the size of a file (RLIMIT_FSIZE) is tried everywhere: no file grows beyond so many bytes.
"""

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.utils.tensorboard  # here, so that forked processes need not load it
from torch import Tensor, nn

import diffusion_opt
from diffusion_opt.evaluation.drill import Outcome
from diffusion_opt.training.checkpoint import CHECKPOINT
from diffusion_opt.training.config import TrainConfig
from diffusion_opt.training.log import METRICS
from diffusion_opt.training.trainer import Role, train

SECTION = "training run"
CONFIG = TrainConfig(steps=24, batch_size=4, warmup_steps=2, checkpoint_seconds=0.0, log_every=5)
CLOCK = ("seconds", "images_per_second")  # columns of the log that are never the same
SIGNALS = {"Ctrl-C": signal.SIGINT, "kill": signal.SIGTERM, "a closed terminal": signal.SIGHUP}


@dataclass
class Pursuit:
    """A student follows a critic that follows the student: two roles, a slow copy, a number, and a fault at a step."""

    fault: Callable[[int, dict[str, Tensor]], None] = lambda step, losses: None
    notes: dict[str, float] = field(default_factory=lambda: {"steps": 0.0}, init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student, self.critic, self.slow = (nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2)) for _ in range(3))
        for network in (self.student, self.critic, self.slow):
            for parameter in network.parameters():
                nn.init.normal_(parameter, generator=generator)
        self.slow.requires_grad_(False)

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student), "critic": Role(self.critic, 2.0)}

    @property
    def kept(self) -> dict[str, nn.Module]:
        return {"slow": self.slow}

    def turn(self, step: int) -> str:
        return "critic" if step % 3 else "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        x = torch.randn(batch_size, 2, generator=generator)
        if turn == "critic":
            losses = {"loss": (self.critic(x) - self.student(x).detach() - self.slow(x)).square().mean()}
        else:
            losses = {"loss": (self.student(x) - self.critic(x).detach().tanh()).square().mean()}
        self.fault(int(self.notes["steps"]), losses)
        return losses

    @torch.no_grad()
    def stepped(self, turn: str) -> None:
        self.notes["steps"] += 1
        for slow, new in zip(self.slow.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(new, 0.1)


class Drill:
    """A folder to work in, the undisturbed run, and processes that are disturbed."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.out, self.told = folder / "run", folder / "error"
        self._end(self._start(Pursuit(), folder / "first"))  # whose time holds that of loading files
        self.whole_seconds = -time.perf_counter()
        self._end(self._start(Pursuit(), folder / "whole"))
        self.whole_seconds += time.perf_counter()
        self.whole = content(folder / "whole")

    def kills(self, tries: int) -> Iterator[str]:
        """SIGKILL at random moments, several for each run until it comes to its end, which counts for all of them."""
        done = 0
        while done < tries:
            self._clear()
            killed, code = 0, -signal.SIGKILL
            while code == -signal.SIGKILL and done + killed < tries:
                process = self._start(Pursuit())
                time.sleep(self.random.uniform(0, self.whole_seconds / 2))
                os.kill(process, signal.SIGKILL)
                code = self._end(process)
                killed += code == -signal.SIGKILL
            end = self._completed()
            yield from [end] * killed
            done += killed

    def signals(self, tries: int) -> Iterator[str]:
        """A signal at a random step: saved, and the next call goes on."""
        for _ in range(tries):
            step, number = self.random.randrange(CONFIG.steps - 1), self.random.choice(list(SIGNALS.values()))
            yield self._resumed(Pursuit(lambda now, _, at=step, n=number: now == at and os.kill(os.getpid(), n)), "")

    def full_disks(self, tries: int) -> Iterator[str]:
        """From a random step on no file grows beyond a random size; with space again the run goes on."""
        largest = max(len(value) for name, value in self.whole.items() if name != METRICS)
        for _ in range(tries):
            step, room = self.random.randrange(CONFIG.steps - 1), self.random.randrange(largest)

            def fill(now: int, losses: dict[str, Tensor], at: int = step, room: int = room) -> None:
                if now == at:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

            yield self._resumed(Pursuit(fill), r"OSError")

    def small_disks(self, tries: int) -> Iterator[str]:
        """The run on a disk (tmpfs) of a random size, which is full at some byte; then the disk grows."""
        need = sum(len(value) for value in self.whole.values())
        for _ in range(tries):
            self._clear()
            self.out.mkdir()
            size = self.random.randrange(16 << 10, 4 * need)
            end = self.folder / "end"
            end.write_text("")
            process = os.fork()
            if not process:
                mount_disk(self.out, size)
                code = self._end(self._start(Pursuit()))
                error = self.told.read_text()
                grow_disk(self.out)
                end.write_text(self._completed() if code == 0 or "OSError" in error else f"ended with {code}: {error}")
                os._exit(0)
            self._end(process)
            yield end.read_text() or "the process ended without a word"

    def not_finite(self, tries: int) -> Iterator[str]:
        """A loss becomes NaN at a random step; when that is repaired the run goes on from the weights before it."""
        for _ in range(tries):
            step = self.random.randrange(CONFIG.steps)

            def spoil(now: int, losses: dict[str, Tensor], at: int = step) -> None:
                if now == at:
                    losses["loss"] = losses["loss"] * torch.nan

            yield self._resumed(Pursuit(spoil), "FloatingPointError")

    def damaged(self, tries: int, how: str) -> Iterator[str]:
        """One file of a checkpoint with a flipped bit, cut off, or gone: refused by name, and nothing is touched."""
        for number in range(tries):
            self._clear()
            self._end(self._start(Pursuit(lambda now, _: now == CONFIG.steps // 2 and os.kill(os.getpid(), 2))))
            files = sorted((self.out / CHECKPOINT).iterdir())
            path = files[number % len(files)]
            damage(path, how, self.random)
            left = content(self.out)
            code = self._end(self._start(Pursuit()))
            error = self.told.read_text()
            if code == 0:  # a bit of white space is no damage
                yield "held" if content(self.out) == self.whole else f"{path.name}: nothing was noticed"
            elif "CorruptFileError" in error and path.name in error and content(self.out) == left:
                yield "refused"
            else:
                yield f"{path.name}: {error}"

    def doubled(self, tries: int) -> Iterator[str]:
        """Two runs at once: one finishes undisturbed, the other is told who works there (or comes after it)."""
        for _ in range(tries):
            self._clear()
            processes = [self._start(Pursuit(), told=self.folder / f"error-{index}") for index in range(2)]
            codes = [self._end(process) for process in processes]
            errors = [(self.folder / f"error-{index}").read_text() for index in range(2) if codes[index]]
            if len(errors) == 2 or any("FolderInUseError" not in error for error in errors):
                yield f"two at once: {errors}"
            else:
                yield self._completed()

    def _resumed(self, disturbed: Pursuit, error: str) -> str:
        """The end of a run that is disturbed, which must end with `error` ("" for none), and then started again."""
        self._clear()
        code = self._end(self._start(disturbed))
        if (code != 0) != bool(error) or (error and error not in self.told.read_text()):
            return f"ended with {code}: {self.told.read_text()}"
        return self._completed()

    def _completed(self) -> str:
        """Start the run once more, undisturbed, and compare."""
        self._end(self._start(Pursuit()))
        return "held" if content(self.out) == self.whole else self.told.read_text() or "another result"

    def _clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def _start(self, method: Pursuit, out: Path | None = None, told: Path | None = None) -> int:
        """Fork a process that trains; it writes what it raises to a file and ends with 1."""
        told = told or self.told
        told.write_text("")
        process = os.fork()
        if process:
            return process
        try:
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            train(method, CONFIG, out or self.out, progress=False)
        finally:  # whatever happened: this process is a copy and must not go on with the drill
            if (error := sys.exception()) is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                place = traceback.extract_tb(error.__traceback__)[-1]
                told.write_text(f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")
            os._exit(0 if error is None else 1)

    @staticmethod
    def _end(process: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(out: Path) -> dict[str, bytes]:
    """What a run leaves that must be the same: the tensors of its checkpoint, and its log without the clock."""
    found = {path.name: path.read_bytes() for path in sorted((out / CHECKPOINT).glob("*.safetensors"))}
    rows = (json.loads(line) for line in (out / METRICS).read_text().splitlines()) if found else ()
    kept = [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]
    return found | {METRICS: json.dumps(kept, allow_nan=False).encode()}


def damage(path: Path, how: str, source: random.Random) -> None:
    """Flip a random bit of a file, cut it at a random byte, or remove it."""
    whole = path.read_bytes()
    if how == "lost":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[: source.randrange(len(whole))])
    else:
        place = source.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << source.randrange(8)]) + whole[place + 1 :])


def mount_disk(folder: Path, size: int) -> None:
    """A disk of `size` bytes at a folder, for this process and its children alone. Raises OSError if that is forbidden.

    A mount in a user namespace of its own, so that no rights are needed where the system allows such namespaces.
    """
    user, group = os.getuid(), os.getgid()
    _call("unshare", 0x10000000 | 0x00020000)  # CLONE_NEWUSER | CLONE_NEWNS
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def grow_disk(folder: Path) -> None:
    """Space for all that was meant to be written."""
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", 32, b"size=64m")  # MS_REMOUNT


def can_mount(folder: Path) -> bool:
    """Whether this system lets us mount a small disk; tried in a process of its own."""
    process = os.fork()
    if not process:
        try:
            mount_disk(folder, 1 << 20)
        except OSError:
            os._exit(1)
        os._exit(0)
    return Drill._end(process) == 0


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def outcomes(folder: Path, kills: int, others: int, seed: int = 0) -> list[Outcome]:
    """All disturbances of a training run, in an empty folder of the disk that is to be tried."""
    drill = Drill(folder, seed)
    (folder / "disk").mkdir()
    disks = {"a disk that is full": drill.small_disks(others)} if can_mount(folder / "disk") else {}
    faults = {
        "killed at random moments": drill.kills(kills),
        "Ctrl-C, kill, closed terminal": drill.signals(others),
        **disks,
        "files limited to a size": drill.full_disks(others),
        "a loss that is NaN": drill.not_finite(others),
        "a flipped bit in a checkpoint": drill.damaged(others, "flipped"),
        "a checkpoint cut off": drill.damaged(others, "cut"),
        "a file of a checkpoint lost": drill.damaged(others, "lost"),
        "two runs at once": drill.doubled(others),
    }
    return [Outcome.of(SECTION, fault, ends) for fault, ends in faults.items()]


def in_a_process(kills: int, others: int, folder: Path | None = None) -> list[Outcome]:
    """`outcomes` by a fresh interpreter with one thread: forking a process with threads is not safe.

    `folder` lies on the disk to try, by default that of temporary files. Raises RuntimeError if the drill itself fails.
    """
    command = [sys.executable, "-m", "diffusion_opt.training.drill", str(kills), str(others)]
    root = str(Path(diffusion_opt.__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        done = subprocess.run([*command, work], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the drill ended with {done.returncode}: {done.stderr[-2000:]}")
    return [Outcome.from_dict(one) for one in json.loads(done.stdout)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = outcomes(Path(sys.argv[3]), int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps([one.as_dict() for one in found]))
