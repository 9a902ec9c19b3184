"""The door for methods from outside: registered, set, recorded, resumed and refused like our own."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from small_pipelines import small_pipeline

from diffusion_opt import plugins
from diffusion_opt.cli import main
from diffusion_opt.distillation import methods, opening
from diffusion_opt.distillation.make import StudentPlan, make_student
from diffusion_opt.evaluation.judges import named
from diffusion_opt.models import TinyFlux2Config, load
from diffusion_opt.plugins import load_plugins
from diffusion_opt.recipes import Recipe, recipe
from diffusion_opt.subjects import Run
from diffusion_opt.training import TrainConfig

PARTS = str(Path(__file__).parents[1] / "examples" / "parts_plugin.py")
IMM = str(Path(__file__).parents[1] / "examples" / "imm_plugin.py")
BRIEF = TrainConfig(steps=2, batch_size=8, warmup_steps=1)


@pytest.fixture(autouse=True)
def own_lists(request: pytest.FixtureRequest) -> None:
    """What a test registers is gone after it."""
    for table in (methods.METHODS, recipe.TECHNIQUES, named.JUDGES, opening.OPENERS):
        before = dict(table)
        request.addfinalizer(lambda table=table, before=before: (table.clear(), table.update(before)))


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


def test_a_technique_of_a_plugin_is_written_in_recipes_and_leaves_no_bit_behind(teacher: str) -> None:
    load_plugins([PARTS])
    fused = Recipe.from_dict({"techniques": [{"technique": "fused_projections"}]})
    assert fused.to_dict() == {"techniques": [{"technique": "fused_projections"}]}
    pipe = load(teacher)
    run = Run.for_pipeline(pipe, num_inference_steps=2)
    before = run.generate(pipe, [0, 1])
    fused.apply(pipe)
    with pytest.raises(ValueError, match="the projections of transformer are fused already"):
        fused.apply(pipe)
    assert torch.allclose(run.generate(pipe, [0, 1]), before, atol=1e-5)
    assert any(name.endswith("to_qkv") for name, _ in pipe.transformer.named_modules())
    fused.remove(pipe)
    assert torch.equal(run.generate(pipe, [0, 1]), before)
    int8 = {"technique": "dynamic_int8", "min_width": 0}
    with pytest.raises(ValueError, match="a recipe can change the weights once"):
        Recipe.from_dict({"techniques": [{"technique": "fused_projections"}, int8]})
    with pytest.raises(ValueError, match="a technique is a frozen dataclass"):
        recipe.register("mine", dict, recipe.STORED)
    with pytest.raises(ValueError, match="there is a technique 'solver' already"):
        recipe.register("solver", type(fused.techniques[0]), recipe.STORED)


def test_the_measuring_command_takes_a_technique_and_a_judge(teacher: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fused.json").write_text(json.dumps({"techniques": [{"technique": "fused_projections"}]}))
    command = ["measure", teacher, "--steps", "2", "--against", "fused.json", "--samples", "2", "--rounds", "1"]
    with pytest.raises(SystemExit):
        main([*command, "--judges", "brightness"])
    assert "no judge 'brightness': there are fashion, imagenet" in capsys.readouterr().err
    main([*command, "--judges", "brightness", "paired", "--plugin", PARTS])
    judged = json.loads(Path("runs/measure/measurement.json").read_text())["fused"]["judged"]
    assert judged["brightness.off"]["value"] < 1e-4 and judged["paired.pixel"]["value"] < 1e-4


def test_a_subject_of_a_plugin_is_distilled_by_the_command(teacher: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["distill", "--method", "finetune", "--steps", "8", "--updates", "1", "--batch-size", "4",
             "--data-limit", "40", "--threads", "1", "--out", "run"]  # fmt: skip
    main([*small, "--teacher", f"mirrored:{teacher}", "--plugin", PARTS])
    record = json.loads(Path("run/student.json").read_text())
    assert record["teacher_identity"]["data"] == "mirrored" and load("run/pipeline").config.default_steps == 8
    with pytest.raises(SystemExit):
        main([*small, "--teacher", teacher, "--plugin", PARTS])  # the same weights, other pictures
    assert "mirrored" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*small, "--teacher", "turned:there", "--plugin", PARTS])
    assert "unknown model 'turned:there'" in capsys.readouterr().err


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
