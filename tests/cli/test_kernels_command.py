"""`diffusion-opt kernels`: what it prints, when it fails, what it writes. The compiler is stood in for."""

from types import SimpleNamespace

import pytest

from diffusion_opt.cli import kernels
from diffusion_opt.kernels.gate import cases as compile_cases
from diffusion_opt.kernels.gate import report as compile_report
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.launch import LaunchConfig

ROW = {
    "tile": [128, 64], "warps": 8, "stages": 2, "registers": 176, "spills": 0, "shared_bytes": 131072,
    "programs_per_sm": 1, "instructions": 1833, "matrix": {"HGMMA": 24}, "async_copies": 24, "tma": 0, "serial": 0.58,
    "overlapped": 1.0, "bound_by": "tensor",
}  # fmt: skip
JOBS = [("dense", 80), ("dense", 90), ("row", 90)]


def case(name: str, *archs: int) -> CompileCase:
    launch = dict.fromkeys(archs, LaunchConfig(128, 64, 8, 2))
    return CompileCase(name, print, {"x": "*fp32"}, {}, (), launch, tiles=())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path) -> SimpleNamespace:
    """Two cases, a table that holds them, and a compiler whose results a test can change."""
    state = SimpleNamespace(changes={}, problems=[], asked=[], path=tmp_path / "report.json")
    cases = (case("dense", 80, 90), case("row", 90))

    def compiled(cases, wanted, workers):
        state.asked = list(wanted)
        return {job: {**ROW, **state.changes.get(job, {})} for job in wanted}, state.problems

    monkeypatch.setattr(compile_cases, "all_cases", lambda: cases)
    monkeypatch.setattr(kernels, "_compiled", compiled)
    monkeypatch.setattr(compile_report, "REPORT", state.path)
    load, save = compile_report.load, compile_report.save
    monkeypatch.setattr(compile_report, "load", lambda: load(state.path))
    monkeypatch.setattr(compile_report, "save", lambda rows: save(rows, state.path))
    save(dict.fromkeys(JOBS, ROW), state.path)
    state.recorded = lambda: load(state.path)
    return state


def exit_code(**options) -> int:
    with pytest.raises(SystemExit) as stopped:
        kernels.report(**options)
    return stopped.value.code


def test_unchanged_kernels_pass_and_are_shown(gate, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert exit_code() == 0
    assert gate.asked == JOBS
    printed = capsys.readouterr().out
    for word in ("dense", "128x64", "HGMMA 24", "0.58", "tensor"):
        assert word in printed


def test_a_worse_kernel_fails_and_the_message_names_the_refreshing_command(gate, capsys):
    gate.changes = {("dense", 90): {"registers": 240}}
    assert exit_code() == 1
    printed = capsys.readouterr().out
    assert "dense on sm_90: registers was 176, is 240" in printed
    assert "diffusion-opt kernels report --update" in printed


def test_update_writes_what_was_compiled_and_keeps_the_rest(gate):
    gate.changes = {("dense", 90): {"registers": 240}}
    assert exit_code(update=True, only="dense", arch=90) == 0
    assert gate.asked == [("dense", 90)]
    recorded = gate.recorded()
    assert recorded["dense", 90]["registers"] == 240
    assert recorded["dense", 80] == recorded["row", 90] == ROW
    assert exit_code() == 0


def test_update_forgets_cases_that_are_gone(gate):
    compile_report.save({**dict.fromkeys(JOBS, ROW), ("old", 90): ROW})
    assert exit_code() == 1
    assert exit_code(update=True) == 0
    assert set(gate.recorded()) == set(JOBS)


def test_a_spilling_kernel_fails_even_when_it_is_written_down(gate, capsys):
    gate.problems = ["dense on sm_80: registers spill"]
    assert exit_code(update=True) == 1
    assert "registers spill" in capsys.readouterr().out


def test_a_filter_that_leaves_nothing_is_refused_with_the_names(gate):
    with pytest.raises(ValueError, match=r"--only nothing.*there are: dense, row"):
        kernels.report(only="nothing")


def test_explain_has_a_line_for_each_precision(capsys):
    kernels.explain(device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" attention")[0] for line in lines] == ["dense", "int8", "int8-fp8", "fp8", "nvfp4"]
    assert all("q is on a CPU" in line for line in lines)


def test_explain_says_what_is_not_possible(capsys, monkeypatch):
    from diffusion_opt.kernels import runtime

    monkeypatch.setattr(runtime, "mode", lambda tensor: "cuda")
    monkeypatch.setattr(runtime, "architecture", lambda device: 80)
    kernels.explain(device="cpu")
    printed = capsys.readouterr().out
    assert "dense attention by a Triton kernel for sm_80" in printed
    assert "fp8 attention: not possible: " in printed and "it runs on sm_89" in printed
