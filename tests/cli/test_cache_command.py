"""`diffusion-opt cache`: what the commands write serves the pipeline it was made with, and bad wishes are refused."""

from pathlib import Path

import pytest
from small_pipelines import generate, small_pipeline
from tiny_pipelines import tiny_pipeline

from diffusion_opt.caching import CacheSchedule, ErrorBound, ErrorBoundedCache, ScheduledCache, StepCalibration
from diffusion_opt.cli.cache import calibrate, compare, search, shares_of
from diffusion_opt.cli.options import Asked
from diffusion_opt.models import load

TWO = Asked(prompts=("0", "1"))


@pytest.fixture
def folder(tmp_path) -> str:
    small_pipeline(default_steps=6, default_guidance=2.0).save_pretrained(tmp_path / "toy")
    return str(tmp_path / "toy")


def test_search_writes_schedules_and_a_bound_that_the_pipeline_can_use(folder, tmp_path, capsys):
    out = tmp_path / "out"
    search(
        folder, TWO, budgets=(3,), trials=1, max_gap=3, held_out=2, bound_samples=9, bound_budgets=(5,),
        out=out,
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["toy-3.json", "toy-error-bound.json"]
    schedule, bound = CacheSchedule.load(out / "toy-3.json"), ErrorBound.load(out / "toy-error-bound.json")
    assert schedule.num_computed == 3 and schedule.num_held_out == 2
    assert [sum(mask) for mask in bound.masks] == [6, 5, 3] and len(bound.errors) == 9
    assert bound.masks[2] == schedule.mask
    printed = capsys.readouterr().out
    assert schedule.describe() in printed and "with confidence 0.9: " in printed
    search(folder, TWO, budgets=(3,), trials=2, max_gap=3, held_out=0, out=out)
    further = CacheSchedule.load(out / "toy-3.json")
    assert further.start_error == pytest.approx(schedule.error) and further.error <= schedule.error
    pipe = load(folder)
    generate(ScheduledCache(str(out / "toy-3.json")).apply(pipe), steps=6)
    ScheduledCache(str(out / "toy-3.json")).remove(pipe)
    generate(ErrorBoundedCache(9.0, str(out / "toy-error-bound.json")).apply(pipe), steps=6)


def test_calibrate_writes_a_calibration_of_the_models_own_run(folder, tmp_path, capsys):
    calibrate(folder, TWO, out=tmp_path)
    found = StepCalibration.load(tmp_path / "toy-calibration.json")
    assert (found.run.num_inference_steps, found.run.guidance_scale) == (6, 2.0)
    assert "R2" in capsys.readouterr().out


def test_what_cannot_be_done_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="got a budget of 1: choose one of these or a larger max_gap"):
        search(folder, TWO, budgets=(1,), max_gap=3, held_out=0, out=tmp_path)
    with pytest.raises(ValueError, match="cannot write to"):
        (tmp_path / "file").touch()
        search(folder, out=Path(tmp_path / "file"))


def test_budgets_are_shares_of_the_steps():
    assert shares_of(50) == shares_of(50, 12) == (20, 15, 10, 7)
    assert shares_of(8) == (3, 2) and shares_of(28, 12) == (11, 8, 6, 4)
    assert shares_of(50, 3) == (20,) and shares_of(50, 2) == (26,) and shares_of(2) == (2,)


def test_the_whole_room_on_a_pipeline_of_the_user(tmp_path, capsys):
    """The run that the flags describe is the one that is calibrated, searched and compared."""
    tiny_pipeline("sd3").save_pretrained(tmp_path / "mine")
    (tmp_path / "call.json").write_text('{"max_sequence_length": 32}')
    asked = Asked(("a cat", "a dog"), 5, 4.0, 32, 32, call=tmp_path / "call.json")
    mine, out = str(tmp_path / "mine"), tmp_path / "out"
    calibrate(mine, asked, out=out)
    search(mine, asked, budgets=(3,), trials=1, held_out=1, out=out)
    compare(mine, asked, budgets=(3,), samples=2, only=("fewer Euler steps", "even spacing, forecast"), out=out)
    assert {path.name for path in out.iterdir()} == {f"mine-{name}.json" for name in ("calibration", "3", "comparison")}
    found = StepCalibration.load(out / "mine-calibration.json")
    assert (found.run.num_inference_steps, found.run.guidance_scale) == (5, 4.0)
