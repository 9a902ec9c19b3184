"""A student's folder knows its teacher, start, data and settings; other classes and damaged teachers are refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_pipelines import small_pipeline

from diffusion_opt.datasets import CorruptFileError, ImageData
from diffusion_opt.distillation import builders, methods, starts
from diffusion_opt.distillation.make import StudentPlan, make_student
from diffusion_opt.distillation.methods import METHODS
from diffusion_opt.distillation.record import RECORD
from diffusion_opt.distillation.starts import pairs_folder, with_start
from diffusion_opt.distillation.trajectory import METHODS as SETTINGS
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.models import TinyFlux2Config
from diffusion_opt.subjects import ClassConditional
from diffusion_opt.training import TrainConfig

BRIEF = TrainConfig(steps=1, batch_size=4, warmup_steps=1)
SIZE = TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=8)
PAIRS = PairConfig(num_pairs=4, guidance_scale=2.0, num_rungs=4, num_steps=4)


def teacher(folder: Path, seed: int = 0, **changes: object) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    small_pipeline(replace(SIZE, **changes), seed=seed, std=0.05, default_guidance=2.0).save_pretrained(folder)
    return str(folder)


def make(plan: StudentPlan, out: Path, **given: object) -> None:
    make_student(plan, BRIEF, out, progress=False, **given)


def test_a_teacher_that_is_replaced_under_its_path_is_noticed(tmp_path: Path) -> None:
    plan = StudentPlan(teacher(tmp_path / "t"), "consistency", 1)
    make(plan, tmp_path / "run")
    make(plan, tmp_path / "run")
    shutil.move(tmp_path / "t", tmp_path / "moved")
    make(replace(plan, teacher=str(tmp_path / "moved")), tmp_path / "run")  # the same weights elsewhere
    teacher(tmp_path / "t", seed=1)
    with pytest.raises(ValueError, match=r"whose teacher is '.*moved' \(model \w+\), now it is '.*t' \(model \w+\)"):
        make(plan, tmp_path / "run")


def test_trajectories_of_two_teachers_lie_in_two_folders(tmp_path: Path) -> None:
    plans = {}
    for seed, name in enumerate("ab"):  # where make_teacher leaves them
        plans[name] = StudentPlan(teacher(tmp_path / name / "pipeline", seed), "ode", 1, pairs=PAIRS)
    folders = {name: pairs_folder(plan, tmp_path / "runs") for name, plan in plans.items()}
    assert [folder.name for folder in folders.values()] == ["a-pairs-n4", "b-pairs-n4"]
    make(plans["a"], tmp_path / "sa", pairs_folder=folders["a"])
    with pytest.raises(ValueError, match="holds trajectories of the teacher"):
        make(plans["b"], tmp_path / "sb", pairs_folder=folders["a"])
    shutil.copytree(tmp_path / "b" / "pipeline", tmp_path / "a" / "pipeline", dirs_exist_ok=True)
    replaced = pairs_folder(plans["a"], tmp_path / "runs")
    assert replaced.name.startswith("a-pairs-n4-") and replaced != folders["a"]


def test_settings_of_the_method_are_compared(tmp_path: Path) -> None:
    plan = StudentPlan(teacher(tmp_path / "t"), "consistency", 1)
    make(plan, tmp_path / "run")
    other = builders.flow_map_with(replace(SETTINGS["consistency"], hops=(2, 3)))
    with pytest.raises(ValueError, match=r"hops=\[4, 32\], now \[2, 3\]"):
        make(plan, tmp_path / "run", method=replace(METHODS["consistency"], build=other))


def test_a_start_is_known_by_its_weights(tmp_path: Path) -> None:
    start = teacher(tmp_path / "s", seed=2)
    plan = StudentPlan(teacher(tmp_path / "t"), "sid", 1, start=start)
    make(plan, tmp_path / "run")
    teacher(tmp_path / "s", seed=3)
    with pytest.raises(ValueError, match="holds a student whose start is"):
        make(plan, tmp_path / "run")


def test_a_record_that_is_lost_or_damaged_is_no_licence(tmp_path: Path) -> None:
    plan = StudentPlan(teacher(tmp_path / "t"), "consistency", 1)
    make(plan, tmp_path / "run")
    (tmp_path / "run" / RECORD).write_text("")
    with pytest.raises(CorruptFileError, match=r"student.json is damaged \(0 bytes"):
        make(plan, tmp_path / "run")
    (tmp_path / "run" / RECORD).unlink()
    with pytest.raises(ValueError, match=r"holds a checkpoint but no student\.json"):
        make(replace(plan, guidance=3.0), tmp_path / "run")


def test_a_start_of_another_plan_or_budget_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = replace(BRIEF, minutes=1)
    for name in ("ode", "flow_map"):
        presets = dict.fromkeys(METHODS[name].presets, quick)
        monkeypatch.setitem(methods.METHODS, name, replace(METHODS[name], presets=presets))
    name = teacher(tmp_path / "t")
    wanted, runs = StudentPlan(name, "dmd2", 4), tmp_path / "runs"
    make(StudentPlan(name, "flow_map", 4, classes=("dress",)), runs / "t-flow-map")
    with pytest.raises(ValueError, match=r"not the start that .*classes=\['dress'\], now \[\]; .*--start"):
        with_start(wanted, runs, progress=False)
    shutil.rmtree(runs)
    make(StudentPlan(name, "flow_map", 4), runs / "t-flow-map")
    with pytest.raises(ValueError, match="trained with minutes=None, its own preset says 1"):
        with_start(wanted, runs, progress=False)
    shutil.rmtree(runs)
    assert with_start(wanted, runs, progress=False)[1]
    teacher(tmp_path / "t", seed=4)
    with pytest.raises(ValueError, match="whose teacher is"):
        with_start(wanted, runs, progress=False)
    assert starts.is_finished(runs / "t-flow-map")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": tuple(f"digit {i}" for i in range(10))}, "no data set here has the classes digit 0"),
        ({"class_names": ("a", "b", "c", "d")}, "no data set here has the classes a, b, c, d"),
        ({"channels": 3}, r"comes as .* = \(1, 28, 28\), \(1, 16, 16\), the network draws \(3, 16, 16\)"),
        ({"image_size": 32}, r"the network draws \(1, 32, 32\)"),
    ],
)
def test_a_teacher_of_other_data_gets_none(tmp_path: Path, changes: dict, message: str) -> None:
    name = teacher(tmp_path / "t", **changes)
    for method in ("consistency", "ladd"):
        plan = StudentPlan(name, method, 1, start=name if METHODS[method].starts else None)
        with pytest.raises(ValueError, match=message):
            make(plan, tmp_path / method)
        assert not (tmp_path / method).exists()
    make(StudentPlan(name, "ode", 1, pairs=PAIRS), tmp_path / "ode")  # learns from no images


def test_images_of_its_own_classes_serve_any_teacher(tmp_path: Path) -> None:
    names = tuple("abcdefghijkl")
    name = teacher(tmp_path / "t", class_names=names, channels=3)
    images = ImageData(torch.randn(24, 3, 16, 16).clamp(-1, 1), torch.arange(24) % 12, names)
    subject = ClassConditional(ClassConditional.open(name).pipe, name, images)
    make(StudentPlan(name, "ladd", 1, start=name), tmp_path / "run", subject=subject)
    seen = subject.with_data().data.draw(50, torch.Generator().manual_seed(0))[1]
    assert seen.num_classes == 12 and seen.drop().labels.unique().tolist() == [12]
    with pytest.raises(ValueError, match=r"the images are of a, b, .*, .* draws t-shirt"):
        ClassConditional(small_pipeline(SIZE), "other", images)


@pytest.mark.parametrize("method", ["ode", "consistency", "ladd", "sid"])
def test_a_damaged_teacher_is_named_and_nothing_is_written(tmp_path: Path, method: str) -> None:
    pipe = small_pipeline(SIZE, std=0.05)
    with torch.no_grad():
        pipe.class_embedder.table.weight[3] = torch.nan
    pipe.save_pretrained(tmp_path / "t")
    start = teacher(tmp_path / "s") if METHODS[method].starts else None
    plan = StudentPlan(
        str(tmp_path / "t"), method, 1, start=start, pairs=PAIRS if method == "ode" else None, guidance=None
    )
    with pytest.raises(FloatingPointError, match=r"the teacher '.*t' holds NaN or infinity in embedder.table.weight"):
        make(
            replace(plan, guidance=2.0 if method == "ode" else None), tmp_path / "run", pairs_folder=tmp_path / "pairs"
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()
