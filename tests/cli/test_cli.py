"""The command as a user meets it: help, refusals in one line, and the shipped models end to end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_opt.datasets import data_dir
from diffusion_opt.quantization.faster.bfloat16 import fast_here


def run(*arguments: str, data: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    if data is not None:
        environment["DIFFUSION_OPT_DATA"] = str(data)
    command = [sys.executable, "-m", "diffusion_opt.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def one_line_refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffusion-opt: ")]
    assert len(lines) == 1
    return lines[0]


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("doctor", "demo", "train", "distill"):
        assert command in done.stdout


def test_help_of_a_command_explains_its_flags() -> None:
    done = run("demo", "--help")
    assert done.returncode == 0
    for flag in ("--samples", "--threads", "--device", "--seed", "--out"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--samples", "3"), "--samples must be at least 20"),
        (("demo", "--batch-size", "0"), "--batch-size must lie in 1"),
        (("demo", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("demo", "--device", "cuda"), "no NVIDIA GPU"),
        (("train", "teacher", "--minutes", "-1"), "minutes must be positive, got -1"),
        (("distill", "--steps", "1", "--teacher", "nobody"), "unknown model 'nobody'"),
    ],
)
def test_bad_values_end_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the test wants to be missing")
    assert message in one_line_refusal(run(*arguments, cwd=tmp_path))


def test_unknown_flags_and_commands_are_refused() -> None:
    assert run("demo", "--sample-size", "9").returncode == 2
    assert run("dance").returncode == 2


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("demo", "--out", str(tmp_path / "file" / "out"))
    assert "choose another folder with --out" in one_line_refusal(done)


@pytest.fixture
def copied_data(tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    copy.mkdir()
    shutil.copytree(data_dir() / "models" / "fashion", copy / "models" / "fashion")
    return copy


def test_a_missing_weight_file_is_named(copied_data: Path, tmp_path: Path) -> None:
    weights = copied_data / "models/fashion/transformer/diffusion_pytorch_model.safetensors"
    weights.unlink()
    line = one_line_refusal(run("demo", "--out", str(tmp_path / "out"), data=copied_data))
    assert "diffusion_pytorch_model.safetensors is missing" in line


def test_a_corrupt_weight_file_is_named(copied_data: Path, tmp_path: Path) -> None:
    weights = copied_data / "models/fashion/transformer/diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    line = one_line_refusal(run("demo", "--out", str(tmp_path / "out"), data=copied_data))
    assert "is damaged" in line


def test_training_stops_at_its_budget_and_resumes(tmp_path: Path) -> None:
    command = ("train", "teacher", "--model", "fashion-micro", "--steps", "2", "--out", str(tmp_path / "run"))
    first = run(*command)
    assert first.returncode == 0, first.stderr
    assert "finished after 2 steps" in first.stdout
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
    assert "finished after 2 steps" in run(*command).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_runs_the_whole_ladder(tmp_path: Path) -> None:
    done = run("demo", "--samples", "40", "--batch-size", "20", "--threads", "1", "--out", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "demo/report.json").read_text())
    names = [rung["name"] for rung in report["rungs"]]
    assert names[0] == "teacher"
    assert "combined" in names
    assert ("combined, bfloat16" in names) == fast_here(torch.device("cpu")), "left out where it would be slower"
    by_name = {rung["name"]: rung for rung in report["rungs"]}
    assert by_name["teacher"]["nfe"] == 100
    assert by_name["1-step student"]["nfe"] == 1
    assert by_name["combined"]["speedup"] > 40  # measured at 20 images a call on one busy core: a wide margin
    assert by_name["combined"]["weight_mb"] < 0.5 * by_name["teacher"]["weight_mb"]
    assert "combined" in done.stdout
