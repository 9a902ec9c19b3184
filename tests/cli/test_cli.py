"""The command as a user meets it: help, refusals in one line, and the shipped models end to end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffusion_opt
from diffusion_opt.cli import main
from diffusion_opt.cli.commands import COMMANDS, SECTIONS
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


def test_the_overview_names_every_command_and_fits_a_screen() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stdout == run().stdout
    lines = done.stdout.splitlines()
    assert len(lines) <= 35 and all(len(line) <= 92 for line in lines)
    for command in COMMANDS:
        assert f"  {command} " in done.stdout
    assert [name for names in SECTIONS.values() for name in names] == [
        name for name in COMMANDS if name in done.stdout
    ], "each has its place"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_where_it_is_said_to_be_and_explains_its_options_once(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code in (None, 0)
    said = capsys.readouterr().out
    assert f"usage: diffusion-opt {command}" in said and "dummy" not in said
    assert said.count("show this help message and exit") == 1


def test_version() -> None:
    assert run("--version").stdout == f"diffusion-opt {diffusion_opt.__version__}\n"


def test_help_of_a_command_explains_its_flags() -> None:
    done = run("demo", "--help")
    assert done.returncode == 0
    for flag in ("--samples", "--threads", "--device", "--seed", "--out"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doctr",), r"no command 'doctr' \(did you mean doctor\?\)"),
        (("cache", "serch"), r"no command 'cache serch' \(did you mean search\?\)"),
        (("generate", "fashon"), r"unknown model 'fashon' \(did you mean fashion\?\)"),
        (("generate", "nothing/such/here"), "unknown model"),
        (("generate", "models/klien"), r"unknown model 'models/klien' \(did you mean klein\?\)"),
        (("generate", "models"), "models is a folder without a pipeline .*; it holds klein"),
        (("generate", "models/klein"), "models/klein has no classes of its own to ask for: give --prompts"),
        (("generate", "fashion", "--stesp", "3"), r"--stesp.*\(did you mean --steps\?\)"),
        (("generate", "fashion", "--steps", "many"), "--steps: no INT .*'many'"),
        (("generate", "fashion", "--steps", "0"), "--steps must be at least 1, got 0"),
        (("generate", "fashion", "--dtype", "bfloat"), r"invalid choice 'bfloat' \(did you mean bfloat16\?\)"),
        (("generate", "fashion", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("generate", "fashion", "--call", "no.json"), "--call no.json cannot be read"),
        (("generate", "fashion", "--call", "bad.json"), "--call bad.json is not JSON"),
        (("generate", "fashion", "--call", "picture.json"), "image is cat.png, which is not there"),
        (("generate", "fashion", "--prompts", "empty.txt"), "empty.txt is a file without a line of text"),
        (("distill", "--steps", "1", "--method", "dmd3"), r"no method 'dmd3' \(did you mean dmd2\?\)"),
        (("distill", "--steps", "1", "--teacher", "fashio"), r"unknown model 'fashio' \(did you mean fashion\?\)"),
        (("quantize", "fashion", "--format", "nvfp5", "--out", "x"), r"'nvfp5' \(did you mean nvfp4\?\)"),
    ],
)
def test_what_was_mistyped_is_said_in_one_line_before_torch_is_imported(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "models" / "klein").mkdir(parents=True)
    (tmp_path / "models" / "klein" / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "picture.json").write_text('{"image": "cat.png"}')
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert re.fullmatch(rf"diffusion-opt: .*{message}.*\n", said.err), said.err


def test_the_names_that_are_checked_early_are_those_there_are() -> None:
    from diffusion_opt.distillation.methods import METHODS as registered
    from diffusion_opt.names import METHODS

    assert tuple(METHODS) == tuple(registered)


@pytest.mark.parametrize("arguments", [("doctr",), ("generate", "fashon"), ("generate", "fashion", "--steps", "0")])
def test_heavy_libraries_are_not_imported_for_a_mistake(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom diffusion_opt.cli import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'modelopt') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--samples", "3"), "--samples must be at least 20"),
        (("demo", "--batch-size", "0"), "--batch-size must lie in 1"),
        (("demo", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("demo", "--device", "cuda"), "no NVIDIA GPU"),
        (("train", "teacher", "--minutes", "-1"), "minutes must be positive, got -1"),
        (("distill", "--steps", "1", "--teacher", "nobody"), "unknown model 'nobody'"),
        (("generate", "fashion", "--fps", "0"), "--fps must be above 0, got 0"),
        (("video", "train", "autoregressive", "--steps", "1"), "goes on from a teacher: --start"),
        (("video", "train", "teacher", "--steps", "1", "--start", "x", "--dim", "8"), "are of a new model"),
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
    done = run(
        "demo",
        "--samples",
        "20",
        "--batch-size",
        "20",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "demo"),
    )
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
