"""The door for methods from outside: registered, set, recorded, resumed and refused like our own."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from small_pipelines import small_pipeline

from diffusion_opt import plugins
from diffusion_opt.cli import main
from diffusion_opt.distillation import methods
from diffusion_opt.distillation.make import StudentPlan, make_student
from diffusion_opt.models import TinyFlux2Config, load
from diffusion_opt.plugins import load_plugins
from diffusion_opt.training import TrainConfig

IMM = str(Path(__file__).parents[1] / "examples" / "imm_plugin.py")
BRIEF = TrainConfig(steps=2, batch_size=8, warmup_steps=1)


@pytest.fixture(autouse=True)
def own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    pipe = small_pipeline(
        TinyFlux2Config(image_size=16, num_heads=2, head_dim=16, text_dim=8), std=0.05, default_guidance=2.0
    )
    folder = tmp_path_factory.mktemp("teacher")
    pipe.save_pretrained(folder)
    return str(folder)


def test_a_plugin_is_a_method_like_ours_and_its_settings_are_compared(teacher: str, tmp_path: Path) -> None:
    assert load_plugins([IMM]) == (IMM,)
    load_plugins([IMM])  # once more does no harm
    plan = StudentPlan(teacher, "imm", 1, method_settings={"group": "8", "gap": 0.25})
    assert plan.method_settings == {"gap": 0.25, "group": 8}
    _, result = make_student(plan, BRIEF, tmp_path / "run", progress=False)
    record = json.loads((tmp_path / "run" / "student.json").read_text())
    assert result.finished and record["method"] == "imm" and record["settings"]["moments.group"] == 8
    other = StudentPlan(teacher, "imm", 1, method_settings={"group": 4, "gap": 0.25})
    with pytest.raises(ValueError, match="group"):
        make_student(other, BRIEF, tmp_path / "run", progress=False)
    reopened = load(tmp_path / "run" / "pipeline")  # by a process that has no plugin too: it is an ordinary pipeline
    assert reopened.config.flow_map and reopened.config.default_steps == 1


def test_the_command_takes_a_plugin_and_its_settings(teacher: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["distill", "--teacher", teacher, "--method", "imm", "--plugin", IMM, "--steps", "1",
               "--updates", "1", "--batch-size", "8", "--threads", "1"]  # fmt: skip
    main([*command, "--set", "group=2"])
    assert "finished after 1 steps" in (said := capsys.readouterr().out) and "group=2" in said
    for wrong, message in (
        ("group=two", "group must be of the kind of 4, got 'two'"),
        ("groups=2", "there is no setting 'groups'; there are group, gap"),
        ("group", "--set takes name=value, got 'group'"),
        ("group=1", "group must be at least 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--set", wrong])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_is_no_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no plugin at"):
        load_plugins([str(tmp_path / "none.py")])
    with pytest.raises(ValueError, match="there is no module 'no_such_module_here'"):
        load_plugins(["no_such_module_here"])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"has no function register\(\)"):
        load_plugins([str(tmp_path / "empty.py")])


def test_names_are_words_and_are_given_once() -> None:
    with pytest.raises(ValueError, match="there is a method 'ode' already"):
        methods.register("ode", methods.METHODS["reflow"])
    with pytest.raises(ValueError, match="a lower-case word with underscores, got 'My method'"):
        methods.register("My method", methods.METHODS["ode"])


def test_an_installed_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("again", "diffusion_opt.plugins:example", plugins.GROUP)
    called = []
    monkeypatch.setattr(plugins, "example", lambda: called.append(1), raising=False)
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    assert load_plugins() == ("again",) and called == [1]


def test_a_teacher_that_is_trained_on_keeps_its_guidance_and_steps(teacher: str, tmp_path: Path) -> None:
    plan = StudentPlan(teacher, "finetune", 8, method_settings={"drop_condition": 0.2})
    _, result = make_student(plan, BRIEF, tmp_path / "run", progress=False)
    before, after = load(teacher), load(tmp_path / "run" / "pipeline")
    assert result.finished and (after.config.default_steps, after.config.default_guidance) == (8, 2.0)
    assert not after.config.is_distilled and after.scheduler.config == before.scheduler.config
    assert not torch.equal(after.transformer.proj_out.weight, before.transformer.proj_out.weight)
    with pytest.raises(ValueError, match="learns from the images and not from a guided teacher"):
        StudentPlan(teacher, "finetune", 8, guidance=2.0)


@pytest.mark.parametrize(("method", "settings"), [("tcm", {"transition": 0.6}), ("sida", {"alpha": 1.2})])
def test_the_new_methods_of_the_package_use_the_same_door(teacher: str, tmp_path: Path, method, settings) -> None:
    start = StudentPlan(teacher, "consistency", 1)
    make_student(start, BRIEF, tmp_path / "start", progress=False)
    plan = StudentPlan(teacher, method, 1, start=str(tmp_path / "start" / "pipeline"), method_settings=settings)
    pipe, result = make_student(plan, BRIEF, tmp_path / "run", progress=False)
    assert result.finished
    assert torch.isfinite(pipe.transformer.proj_out.weight).all()
