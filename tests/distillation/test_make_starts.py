"""One command from nothing: the student that a method starts from is found, finished or made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_pipelines import small_pipeline

from diffusion_opt.distillation import methods, starts
from diffusion_opt.distillation.make import StudentPlan
from diffusion_opt.distillation.methods import METHODS
from diffusion_opt.distillation.record import RECORD
from diffusion_opt.distillation.starts import is_finished, pairs_folder, usual_folder, with_start
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.models import TinyFlux2Config
from diffusion_opt.training import TrainConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    size = TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=8)
    small_pipeline(size, std=0.05, default_guidance=2.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets and trajectories of seconds."""
    quick = TrainConfig(steps=2, minutes=1, batch_size=4, warmup_steps=1)
    for name in ("ode", "flow_map"):
        presets = dict.fromkeys(METHODS[name].presets, quick)
        monkeypatch.setitem(methods.METHODS, name, replace(METHODS[name], presets=presets))
    pairs = PairConfig(num_pairs=4, guidance_scale=2.0, num_rungs=4, num_steps=4)
    monkeypatch.setattr("diffusion_opt.distillation.plan.PAIRS", pairs)
    monkeypatch.setattr(starts, "PAIRS", pairs)


@pytest.mark.parametrize(
    ("plan", "folder"),
    [
        (("ode", 1, 2.0), "small-1step"),
        (("ode", 4, 2.0), "small-4step"),
        (("dmd2", 1, 2.0), "small-1step-dmd2"),
        (("dmd2", 1, 1.5), "small-1step-dmd2-g1.5"),
        (("flow_map", 4, 2.0), "small-flow-map"),
        (("flow_map", 1, 2.0), "small-flow-map"),
        (("mean_flow_data", 4), "small-mean-flow-data"),
        (("mean_flow", 4, 3.0), "small-mean-flow-g3"),
        (("progressive", 1, 2.0), "small-1step-progressive"),
        (("ode", 4, 2.0, None, None, None, (), None, (0.3, 0.9)), "small-4step-t0.3to0.9"),
    ],
)
def test_folders_are_named_after_what_is_made(teacher: str, plan: tuple, folder: str) -> None:
    assert usual_folder(StudentPlan(teacher, *plan), Path("runs")) == Path("runs") / folder


def test_trajectories_of_other_settings_lie_elsewhere(teacher: str) -> None:
    plan = StudentPlan(teacher, "ode", 1, 2.0)
    other = PairConfig(num_pairs=20, guidance_scale=3.0, seed=1)
    assert pairs_folder(plan, Path("runs")) == Path("runs/small-pairs")
    assert pairs_folder(replace(plan, guidance_interval=(0.3, 0.9)), Path("runs")) == Path("runs/small-pairs-t0.3to0.9")
    assert pairs_folder(replace(plan, guidance=3.0, pairs=other), Path("runs")) == Path("runs/small-pairs-g3-n20-seed1")


def test_a_method_that_needs_no_start_gets_none(teacher: str, tmp_path: Path) -> None:
    plan = StudentPlan(teacher, "flow_map", 4, 1.5)
    assert with_start(plan, tmp_path) == (plan, True)


@pytest.mark.parametrize(("steps", "folder"), [(1, "small-1step"), (4, "small-flow-map")])
def test_a_missing_start_is_made_once(
    teacher: str, tmp_path: Path, brief: None, capsys: pytest.CaptureFixture, steps: int, folder: str
) -> None:
    plan = StudentPlan(teacher, "dmd2", steps, 1.5)
    started, ready = with_start(plan, tmp_path, progress=False)
    assert ready and started == replace(plan, start=str(tmp_path / folder / "pipeline"))
    assert json.loads((tmp_path / folder / RECORD).read_text())["guidance"] == 2.0  # the teacher's own
    assert "dmd2 starts from a student; first" in capsys.readouterr().out
    assert with_start(plan, tmp_path, progress=False) == (started, True)
    assert capsys.readouterr().out == ""


def test_an_interrupted_start_is_finished_first(teacher: str, tmp_path: Path, brief: None) -> None:
    plan = StudentPlan(teacher, "dmd2", 1, 1.5)
    with_start(plan, tmp_path, progress=False)
    path = tmp_path / "small-1step" / RECORD
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))
    assert not is_finished(tmp_path / "small-1step")
    with_start(plan, tmp_path, progress=False)
    assert is_finished(tmp_path / "small-1step")
