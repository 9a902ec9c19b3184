"""The ladder on a tiny model: its rows, its report, and what the report promises to programs."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from diffusion_opt.recipes import (
    LadderResult,
    Recipe,
    Solver,
    Student,
    as_rung,
    measure,
    report,
    run_ladder,
)
from diffusion_opt.recipes.ladder import real_pictures

FIELDS = {
    "name",
    "nfe",
    "ms_per_image",
    "speedup",
    "weight_mb",
    "fid",
    "fid_low",
    "fid_high",
    "class_agreement",
    "features",
    "judged",
}


@pytest.fixture(scope="module")
def result(teacher_folder: Path, student_folder: Path) -> LadderResult:
    recipes = {"teacher": Recipe(), "fewer": Recipe((Solver(2),)), "student": Recipe((Student(str(student_folder)),))}
    return run_ladder(recipes, model=str(teacher_folder), num_samples=40, batch_size=10, progress=False)


def test_rows_have_what_the_report_promises(result: LadderResult) -> None:
    rows = result.rows()
    assert [row["name"] for row in rows] == ["teacher", "fewer", "student"]
    assert all(set(row) >= FIELDS for row in rows)
    assert [row["nfe"] for row in rows] == [12, 4, 1]
    assert rows[0]["speedup"] == 1
    assert rows[2]["speedup"] > rows[1]["speedup"] > 1.5
    assert all(row["fid_low"] <= row["fid"] <= row["fid_high"] for row in rows)
    assert all(row["features"] == "FD (fashion features)" for row in rows)


def test_macs_are_those_of_the_passes(result: LadderResult) -> None:
    macs = [row["macs_per_image"] for row in result.rows()]
    assert macs[0] == pytest.approx(12 * macs[2], rel=1e-6)
    assert macs[1] == pytest.approx(4 * macs[2], rel=1e-6)


def test_images_are_paired_by_seed(result: LadderResult) -> None:
    assert {images.shape for images in result.images.values()} == {(40, 1, 16, 16)}
    near = (result.images["fewer"] - result.images["teacher"]).square().mean()
    unrelated = (result.images["fewer"].roll(10, 0) - result.images["teacher"]).square().mean()
    assert near < unrelated


def test_report_is_written_in_all_forms(result: LadderResult, tmp_path: Path) -> None:
    written = report.write(result, tmp_path, "diffusion-opt demo")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == json.loads(json.dumps(written))
    assert stored["rungs"][0]["name"] == "teacher"
    assert stored["machine"]["versions"]["torch"] == torch.__version__
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<td>student</td>" in page


def test_judges_stand_side_by_side(result: LadderResult) -> None:
    for row in result.rows():
        assert {name.split(".")[0] for name in row["judged"]} == {"fashion", "imagenet", "statistics"}
        assert row["judged"]["fashion.distance"]["value"] == row["fid"]
        assert row["judged"]["imagenet.distance"]["real"] > 0
        assert row["judged"]["imagenet.distance"]["num"] == 40


def test_table_is_whole_at_80_columns(result: LadderResult) -> None:
    rows = result.rows()
    rows[0] |= {"name": "+ guidance interval", "ms_per_image": 174.9, "weight_mb": 118.5, "speedup": 120.3}
    rows[0]["judged"]["imagenet.distance"] |= {"value": 1448.0, "low": 1400.0, "high": 1500.0}
    assert report.table(rows).row_count == 3
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(rows))
    printed = console.file.getvalue()
    for whole in ("+ guidance interval", "1448", "120x", " 118", "174.9", "ImageNet", "call", "TV"):
        assert whole in printed
    assert "…" not in printed


def test_a_model_without_real_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match=r"real pictures of \[16, 28\] pixels, the model makes 64"):
        real_pictures(64)


def test_measure_one_pipeline(teacher_folder: Path, pipe) -> None:
    record = measure(pipe, num_samples=0, batch_size=4, rounds=1, progress=False)
    assert record.nfe == 12
    assert record.quality is None


def test_rung_makes_images_in_the_package_s_range(pipe) -> None:
    images = as_rung(pipe).generate(torch.tensor([1, 2, 3]), torch.Generator().manual_seed(0))
    assert images.shape == (3, 1, 16, 16)
    assert -1 <= images.min() and images.max() <= 1
