"""Ctrl-C and other ends of the command: one line, no traceback, and an exit status that tells."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion_opt.cli import commands, main
from diffusion_opt.distillation import make
from diffusion_opt.training import TrainResult


def interrupted_after(seconds: float, out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffusion_opt.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=out
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    return process


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "diffusion-opt: interrupted"),
        (FloatingPointError("the gradient is not finite"), 2, "diffusion-opt: the gradient is not finite"),
        (OSError("the disk is full"), 2, "diffusion-opt: the disk is full"),
    ],
)
def test_an_end_is_one_line_and_a_status(monkeypatch, capsys, error, status, line):
    def run(arguments: list[str] | None) -> None:
        raise error

    monkeypatch.setattr(commands, "run", run)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == status and capsys.readouterr().err.strip() == line
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_that_follows_from_ctrl_c_is_no_error_of_its_own(monkeypatch, capsys):
    """numpy, for one, turns an interrupt of its import into an ImportError."""

    def run(arguments: list[str] | None) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half of a library") from None

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "diffusion-opt: interrupted"


def test_an_import_error_without_ctrl_c_is_shown(monkeypatch):
    def run(arguments: list[str] | None) -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(ImportError, match="no such library"):
        main([])


@pytest.mark.parametrize(
    ("finished", "alarm", "number", "status"),
    [(True, None, 0, None), (False, None, signal.SIGINT, 130), (False, None, signal.SIGTERM, 143),
     (False, "modes drop", 0, 3)],
)  # fmt: skip
def test_a_run_that_is_not_finished_has_a_status_of_its_own(tmp_path, monkeypatch, finished, alarm, number, status):
    result = TrainResult(torch.nn.Identity(), 3, 1.0, finished, [], alarm=alarm, signal=number)
    monkeypatch.setattr(make, "make_teacher", lambda *arguments: (None, result))
    command = ["train", "teacher", "--model", "fashion-micro", "--out", str(tmp_path), "--checkpoint-seconds", "0"]
    if status is None:
        main(command)
        return
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == status


def test_nothing_heavy_is_imported_before_ctrl_c_is_heard():
    program = (
        "import diffusion_opt.cli, sys; print(sorted({'torch', 'tyro', 'numpy', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0, 5.0])
def test_ctrl_c_while_libraries_load_or_trajectories_are_made(tmp_path, seconds):
    process = interrupted_after(seconds, tmp_path, "distill", "--teacher", "fashion-micro", "--steps", "1")
    _, told = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # the second: before our first line ran
    assert "Traceback" not in told
