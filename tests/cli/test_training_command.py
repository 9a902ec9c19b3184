"""`diffusion-opt distill`: every method in its help, refusals in one line, a student from nothing in one command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_pipelines import small_pipeline
from tiny_pipelines import tiny_pipeline

from diffusion_opt.cli import main
from diffusion_opt.cli.training import distill
from diffusion_opt.distillation import methods, starts
from diffusion_opt.distillation.make import StudentPlan, make_student
from diffusion_opt.distillation.methods import METHODS
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.models import TinyFlux2Config, load
from diffusion_opt.training import TrainConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    size = TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=8)
    small_pipeline(size, std=0.05, default_guidance=2.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Presets and trajectories of seconds, and an empty folder to work in."""
    quick = TrainConfig(steps=2, minutes=1, batch_size=4, warmup_steps=1)
    for name in ("ode", "dmd2"):
        presets = dict.fromkeys(METHODS[name].presets, quick)
        monkeypatch.setitem(methods.METHODS, name, replace(METHODS[name], presets=presets))
    pairs = PairConfig(num_pairs=4, guidance_scale=2.0, num_rungs=4, num_steps=4)
    for module in ("plan", "methods", "starts"):
        monkeypatch.setattr(f"diffusion_opt.distillation.{module}.PAIRS", pairs)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_the_help_teaches_every_method_in_a_line(name: str) -> None:
    assert f"        {name}: {METHODS[name].summary}." in distill.__doc__.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "1", "--method", "magic"), "there are finetune, guidance, ode"),
        (("--steps", "3",), "ode makes students of 1, 2, 4 steps, got 3"),
        (("--steps", "1", "--data-limit", "10"), "ode uses no images"),
        (("--steps", "4", "--method", "flow-map", "--pairs", "9"), "flow_map uses no trajectories"),
        (("--steps", "1", "--minutes", "0"), "minutes must be positive, got 0"),
        (("--steps", "1", "--lora", "0"), "rank must be positive, got 0"),
        (("--steps", "1", "--method", "flow-map", "--classes", "hat"), "classes must be some of t-shirt"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    teacher: str, brief: None, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--teacher", teacher, *arguments])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffusion-opt: ")]
    assert len(lines) == 1 and message in lines[0]


def test_one_command_from_nothing_and_again(teacher: str, brief: None, capsys: pytest.CaptureFixture) -> None:
    command = [
        "distill",
        "--teacher",
        teacher,
        "--method",
        "dmd2",
        "--steps",
        "1",
        "--guidance",
        "1.5",
        "--threads",
        "1",
    ]
    main(command)
    said = capsys.readouterr().out
    assert "dmd2 starts from a student; first ode, 1 minutes, in runs/small-1step" in said
    assert "finished after 2 steps" in said and "pipeline in runs/small-1step-dmd2-g1.5/pipeline" in said
    assert load(Path("runs/small-1step-dmd2-g1.5/pipeline")).config.default_steps == 1
    scales = [json.loads((Path("runs") / run / "student.json").read_text())["guidance"]
              for run in ("small-1step", "small-1step-dmd2-g1.5")]  # fmt: skip
    assert scales == [2.0, 1.5]  # the start is made as it would be by itself
    main(command)
    assert capsys.readouterr().out.startswith("finished after 2 steps")


def test_nothing_follows_a_start_that_was_interrupted(
    teacher: str, brief: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = starts.make_student

    def interrupted(*args: object, **given: object) -> tuple:
        pipe, result = made(*args, **given)
        return pipe, replace(result, finished=False)

    monkeypatch.setattr(starts, "make_student", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--teacher", teacher, "--method", "dmd2", "--steps", "1"])
    assert stop.value.code == 130
    assert capsys.readouterr().out.endswith("stopped; run the same command to go on\n")
    assert not Path("runs/small-1step-dmd2/pipeline").exists()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny_pipeline("wan").save_pretrained(folder)
    return str(folder)


def test_a_pipeline_with_prompts_by_the_same_command(
    wan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n\na dog in the rain\n")
    command = ["distill", "--teacher", wan, "--method", "dmd2", "--steps", "2", "--times", "1", "0.6", "--lora", "2"]
    command += ["--updates", "2", "--batch-size", "2", "--guidance", "5", "--threads", "1"]
    with pytest.raises(SystemExit):
        main([*command])
    assert "tiny-wan has no classes of its own: give prompts" in capsys.readouterr().err
    command += ["--prompts", "prompts.txt", "--height", "32", "--width", "32", "--num-frames", "9"]
    main(command)
    assert "pipeline in runs/tiny-wan-2step-dmd2/pipeline" in capsys.readouterr().out
    student = load(Path("runs/tiny-wan-2step-dmd2/pipeline"))
    assert student.scheduler.config.ladders == [[1.0, 0.6]]
    assert Path("runs/tiny-wan-2step-dmd2/lora/pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(SystemExit):
        main([*command, "--height", "64"])
    assert "holds a student whose teacher is" in capsys.readouterr().err


def test_a_class_conditional_teacher_refuses_prompts(teacher: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["distill", "--teacher", teacher, "--steps", "1", "--prompts", "a cat", "--height", "64"])
    assert "has classes and a size of its own: leave out prompts, height" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_share_the_networks_of_a_pipeline(wan: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "diffusion_opt.cli", "distill", "--teacher", wan, "--steps", "1", "--method", "dmd2", "--shard"]
    command += ["--prompts", "a cat", "a dog", "--height", "32", "--width", "32", "--num-frames", "9"]
    done = subprocess.run(
        [*launch, *command, "--updates", "2", "--batch-size", "2", "--accumulate", "2", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "runs/tiny-wan-1step-dmd2"
    assert len(list((out / "checkpoint" / "shards").glob("*.safetensors"))) == 2
    assert load(out / "pipeline").scheduler.config.ladders == [[1.0]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_make_the_student_that_one_makes(teacher: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "diffusion_opt.cli", "distill", "--teacher", teacher, "--steps", "1", "--pairs", "64"]
    done = subprocess.run(
        [*launch, *command, "--updates", "3", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 3 steps") == 1  # the first process speaks for both
    together = load(tmp_path / "runs/small-1step/pipeline").transformer.state_dict()
    pairs = replace(methods.PAIRS, num_pairs=64, guidance_scale=2.0)
    config = replace(METHODS["ode"].presets[1], minutes=None, steps=3, accumulate=2)
    alone, _ = make_student(
        StudentPlan(teacher, "ode", 1, 2.0, pairs=pairs), config, tmp_path / "alone", progress=False
    )
    for name, weight in alone.transformer.state_dict().items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-5)
