"""The search: resumable to the trial, refused to others, honest about who judges, on shipped and stock pipelines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

import diffusion_opt
from diffusion_opt.cli import main
from diffusion_opt.evaluation.judges import Number
from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.recipes import Recipe, Solver
from diffusion_opt.recipes.search import Budget, Found, Objective, Space, report, search
from diffusion_opt.recipes.search.goal import loss
from diffusion_opt.recipes.search.space import NONE, OWN
from diffusion_opt.recipes.search.trial import Bench
from diffusion_opt.recipes.search.verdict import HELD_OUT, with_own_networks
from diffusion_opt.subjects import Run

SMALL = Budget(trials=4, samples=2, survivors=2, verdict_samples=4, rounds=1)
RUN = Run(("bag", "coat"), batch_size=2)


@pytest.fixture(scope="module")
def found(teacher_folder: Path, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One small search for all that is asked of its result."""
    pipe = diffusion_opt.load(teacher_folder)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("search")
    objective, mine = Objective(tolerance=2.0, students=(str(student_folder),)), {"mine": Recipe((Solver(3),))}
    return search(pipe, objective, SMALL, run=RUN, folder=folder, beside=mine, progress=False)


def test_what_is_found_is_measured_beside_the_teacher_and_my_own(found: Found) -> None:
    names = [one.name for one in found.survivors]
    assert names[0] == "teacher" and names[-1] == "mine" and "found 1" in names
    teacher = found.survivors[0]
    assert teacher.faster == 1 and teacher.loss == 0
    for one in found.survivors[1:]:
        assert one.faster == pytest.approx(teacher.measured.macs / one.measured.macs)
        assert one.measured.protocol.seed == HELD_OUT
    assert len(found.trials) == SMALL.trials
    assert found.pick.search_loss <= 2.0
    assert all(found.pick.faster >= one.faster for one in found.survivors if (one.search_loss or 9) <= 2.0)


def test_arithmetic_of_a_trial_is_that_of_the_full_measurement(found: Found) -> None:
    by_recipe = {trial["recipe"]: trial["macs"] for trial in found.trials if "macs" in trial}
    for one in found.survivors:
        if one.search_loss is not None and one.name != "teacher" and "cache" not in one.recipe.describe().lower():
            assert by_recipe[one.recipe.describe()] == pytest.approx(one.measured.macs, rel=1e-6)


def test_the_pipeline_is_left_as_it_was(pipe: TinyFlux2Pipeline) -> None:
    before = RUN.generate(pipe, [0])
    search(pipe, Objective(), replace(SMALL, trials=3), run=RUN, progress=False)
    assert torch.equal(RUN.generate(pipe, [0]), before)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    pipe: TinyFlux2Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two points to begin with, two that the sampler proposes."""
    starts = Space.starts
    monkeypatch.setattr(Space, "starts", lambda self: starts(self)[:2])
    budget = Budget(trials=4, samples=2, survivors=1, verdict_samples=2, rounds=1)
    whole = search(pipe, Objective(), budget, run=RUN, folder=tmp_path / "whole", progress=False)
    search(pipe, Objective(), replace(budget, trials=1), run=RUN, folder=tmp_path / "parts", progress=False)
    parts = search(pipe, Objective(), budget, run=RUN, folder=tmp_path / "parts", progress=False)
    assert [trial["point"] for trial in parts.trials] == [trial["point"] for trial in whole.trials]


def test_the_study_of_another_search_is_refused(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    search(pipe, Objective(), replace(SMALL, trials=1), run=RUN, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another search: its run is"):
        search(pipe, Objective(), SMALL, run=Run(("bag",)), folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"its objective is"):
        search(pipe, Objective(cost="time"), SMALL, run=RUN, folder=tmp_path, progress=False)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"its model is"):
        search(pipe, Objective(), SMALL, run=RUN, folder=tmp_path, progress=False)


def test_the_space_holds_what_the_pipeline_takes_and_says_why_not(pipe: TinyFlux2Pipeline) -> None:
    space = Space.of(pipe, RUN, ("fashion-1step",))
    assert (space.networks == (OWN,) and "in_channels" in space.refused["fashion-1step"]) or "has" in str(space.refused)
    assert "tea_cache" in space.caches and "adams_bashforth2" in space.solvers
    assert space.attention == (NONE,) and "slower" in space.refused["attention in 8 bits"]
    unet = tiny_pipeline("sdxl")
    with pytest.raises(ValueError, match=r"transformer|UNet"):
        Space.of(unet, tiny_run("sdxl", 4))


def test_a_student_has_no_cache_and_no_solver_to_search(student_folder: Path) -> None:
    student = diffusion_opt.load(student_folder)
    space = Space.of(student, Run(("bag",)))
    assert space.caches == (NONE,) and space.solvers == (OWN,) and "nothing to skip" in space.refused["caches"]


def test_every_start_is_a_recipe_and_the_first_is_the_pipeline_as_it_comes(pipe: TinyFlux2Pipeline) -> None:
    space = Space.of(pipe, RUN)
    recipes = [space.recipe(point) for point in space.starts()]
    assert recipes[0] == Recipe() and len(set(map(str, recipes))) == len(recipes) > 5


def test_two_judges_that_are_one_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot praise what it chose"):
        Objective(judge="fashion.distance", verdict="fashion.distance")
    with pytest.raises(ValueError, match="tolerance"):
        Objective(tolerance=0)
    with pytest.raises(ValueError, match="samples must be at least 2"):
        Budget(samples=1)


def test_losses() -> None:
    assert loss("paired.pixel", Number(0.3, 4, "x"), None) == 0.3
    assert loss("fashion.distance", Number(11.0, 4, "x"), Number(10.0, 4, "x")) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="was not measured"):
        loss("fashion.distance", Number(11.0, 4, "x"), None)


def test_a_judge_without_that_number_is_refused(pipe: TinyFlux2Pipeline) -> None:
    with pytest.raises(ValueError, match=r"no paired\.distance"):
        Bench(pipe, RUN, Objective(judge="paired.distance"), 2).look(Recipe())


def test_copies_share_everything_but_the_networks() -> None:
    pipe = tiny_pipeline("wan2.2")
    copied = with_own_networks(pipe)
    assert copied.vae is pipe.vae and copied.text_encoder is pipe.text_encoder
    assert copied.transformer is not pipe.transformer and copied.transformer_2 is not pipe.transformer_2
    run = tiny_run("wan2.2", 4, batch_size=1)
    assert torch.equal(run.generate(copied, [0]), run.generate(pipe, [0]))


def test_the_report_is_written_in_full(found: Found, tmp_path: Path) -> None:
    report.write(found, tmp_path, "the command")
    stored = json.loads((tmp_path / "search.json").read_text())
    assert [row["name"] for row in stored["survivors"]] == [one.name for one in found.survivors]
    assert Recipe.load(tmp_path / "pick.json") == found.pick.recipe
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert any("the fastest within 200% of the teacher" in line for line in report.words(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux2-klein", "wan"])
def test_any_pipeline_by_one_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(name).save_pretrained("mine")
    run = tiny_run(name, 6)
    Path("call.json").write_text(json.dumps(dict(run.arguments)))
    sizes = [f"--height={run.height}", f"--width={run.width}", f"--guidance={run.guidance_scale}", "--call=call.json"]
    frames = [] if run.num_frames is None else [f"--num-frames={run.num_frames}"]
    main(
        ["search", "mine", "--prompts", "a cat", "two dogs", "--steps", "6", *sizes, *frames, "--trials", "8",
         "--samples", "2", "--survivors", "2", "--verdict-samples", "2", "--tolerance", "1", "--out", "found"]
    )  # fmt: skip
    main(["apply", "mine", "--recipe", "found/pick.json", "--out", "fast"])
    diffusion_opt.load("fast")
