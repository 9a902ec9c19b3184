"""The prepared GPU run, dry: it runs on a CPU, has every part, names what cannot run, and ends when time is over."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dry_run_has_every_part_and_every_kernel(bench, tmp_path, capsys):
    path = tmp_path / "report.json"
    bench.main(out=path, rounds=2, dry=True)
    report = json.loads(path.read_text())
    assert report["dry"] and set(report) == {"machine", "dry", "sizes", "correct", "attention", "linear"}
    assert all(row["right"] and row["relative_error"] == 0 for row in report["correct"])  # the oracle against itself
    names = {row["contender"] for row in report["attention"] if "ms" in row}
    assert {f"diffopt {precision}" for precision in bench.PRECISIONS} <= names
    assert {f"diffopt sparse {density:g}" for density in bench.DENSITIES} <= names
    assert {f"diffopt region {share:g}" for share in bench.SHARES} <= names
    assert {"diffopt linear int8", "diffopt linear fp8", "bfloat16"} <= {
        row["contender"] for row in report["linear"] if "ms" in row
    }
    assert all(row["rounds"] == 2 for row in (*report["attention"], *report["linear"]) if "ms" in row)
    assert all("ms" in row or row["why"] for row in (*report["attention"], *report["linear"]))
    assert "diffopt sparse 0.25" in capsys.readouterr().out


def test_a_wrong_kernel_is_found_and_one_that_fails_does_not_end_the_run(bench, monkeypatch):
    numbers = {"good": 1.0, "cpu": 1.0}

    def refuse(_: str) -> torch.Tensor:
        raise ValueError("no such unit\nmore")

    monkeypatch.setattr(
        bench,
        "checks",
        lambda *_: [
            ("right", 1e-2, lambda w: torch.ones(3)),
            ("wrong", 1e-2, lambda w: torch.ones(3) * (1.5 if w != "cpu" else numbers["cpu"])),
            ("nan", 1e-2, lambda w: torch.full((3,), torch.nan if w != "cpu" else 1.0)),
            ("absent", 1e-2, refuse),
        ],
    )
    rows = {row["check"]: row for row in bench.compare(bench.TINY, "there")}
    assert [rows[name]["right"] for name in ("right", "wrong", "nan", "absent")] == [True, False, False, False]
    assert rows["absent"]["why"] == "no such unit"


def test_timing_ends_when_the_time_is_over(bench):
    calls = []
    rows = bench.measure([bench.Timed("x", lambda: calls.append(1), 1e9)], "cpu", rounds=50, until=0.0)
    assert rows[0]["rounds"] == 1 and len(calls) == 3  # compiled, warmed, measured once


def test_without_a_gpu_it_says_so(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2 and "--dry" in capsys.readouterr().err
