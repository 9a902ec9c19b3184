"""The compile gate: it compiles without a GPU, reports what fails with the compiler's words, and the table holds."""

import json
import re
from dataclasses import replace

import pytest
from kernels.gate import example_kernels

from diffusion_opt.evaluation.machine import usable_cores
from diffusion_opt.kernels.gate import aot
from diffusion_opt.kernels.gate import report as compile_report
from diffusion_opt.kernels.gate.aot import Compiled, Failure, compile_all, compile_case, complaint
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.gate.cases import all_cases
from diffusion_opt.kernels.gate.sass import Loop, MachineCode
from diffusion_opt.kernels.launch import LaunchConfig

EXAMPLES = "kernels.gate.example_kernels:cases"
CASES = {case.name: case for case in example_kernels.cases()}


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, int], Compiled | Failure]:
    """Every example, one worker: the ones that fail lie between those that do not."""
    jobs = [("fine", 80), ("not a power of two", 80), ("fine", 90), ("fine", 100), ("spills", 80)]
    jobs += [("row", 90), ("no such type", 80)]
    found = compile_all(jobs, EXAMPLES, workers=1)
    assert [(one.name, one.arch) for one in found] == jobs
    return {(one.name, one.arch): one for one in found}


@pytest.mark.parametrize(("arch", "opcode"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_each_architecture_uses_its_own_matrix_units(results, arch, opcode):
    compiled = results["fine", arch]
    assert opcode in compiled.code.matrix
    assert compiled.code.loop.exponentials >= 64 * 32 / (4 * 32)  # one for each element of the tile
    assert not compile_report.problems(CASES["fine"], compiled)
    assert (compiled.tensor_memory_columns > 0) == (arch == 100)


def test_the_loop_does_the_work_the_case_says(results):
    loop = results["fine", 80].code.loop
    assert loop.flops * 4 == CASES["fine"].loop_flops["bf16"] * 64 * 32


def test_a_row_kernel_has_neither_loop_nor_roofline(results):
    row = compile_report.row_of(CASES["row"], results["row", 90])
    assert "cycles" not in row
    assert row["matrix"] == {}


def test_failures_carry_the_compilers_words_and_do_not_stop_the_rest(results):
    assert "power of 2" in results["not a power of two", 80].reason
    assert "fp8e4nv" in results["no such type", 80].reason
    assert isinstance(results["spills", 80], Compiled)


def test_spilling_is_a_problem_that_names_the_remedy(results):
    (problem,) = compile_report.problems(CASES["spills"], results["spills", 80])
    assert problem.startswith("spills on sm_80: registers spill (")
    assert "smaller tile" in problem


def test_a_missing_opcode_and_memory_that_does_not_fit_are_problems(results):
    demanding = replace(CASES["fine"], opcodes={90: ("QGMMA",)})
    (problem,) = compile_report.problems(demanding, results["fine", 90])
    assert problem == "fine on sm_90: no QGMMA in the machine code, only HGMMA"
    large = replace(results["fine", 90], shared_bytes=228 * 1024)
    (problem,) = compile_report.problems(CASES["fine"], large)
    assert "233472 bytes of shared memory do not fit" in problem


def test_machine_code_is_read_once_and_again_when_the_kernel_differs(monkeypatch, tmp_path):
    listing = "REG:{} STACK:0 SHARED:0\n/*0000*/ EXIT ;"
    read = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aot, "disassemble", lambda cubin: read.append(cubin) or listing.format(len(cubin)))
    first = aot.machine_code(b"one")
    assert aot.machine_code(b"one") == first
    assert aot.machine_code(b"other").registers == 5
    assert read == [b"one", b"other"]


def test_a_worker_that_cannot_start_is_a_failure_with_its_reason():
    (failure,) = compile_all([("fine", 80)], "kernels.no_such_module:cases")
    assert "No module named 'kernels.no_such_module'" in failure.reason


def test_what_the_compiler_printed_before_it_died_is_kept():
    stderr = "Traceback\n a.py:3:1: error: unsupported\n#loc = x\n a.py:3:1: error: unsupported\nRuntimeError: failed\n"
    assert complaint(stderr) == "a.py:3:1: error: unsupported\nRuntimeError: failed"


SERIAL = Loop(100, {}, 64, {"HGMMA": 4}, None, waits=4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"remarks": ("C7515",)}, r"serialized \(C7515"),
        ({"code": MachineCode(64, 0, 0, 0, 500, {"HGMMA": 4}, loop=SERIAL)}, "4 waits for {'HGMMA': 4}"),
        ({"absent": ("max.NaN.f32",)}, "no max.NaN.f32 in the PTX: a NaN would become a number"),
    ],
)
def test_serialized_products_and_a_lost_nan_are_problems(change, says):
    fine = Compiled("fine", 90, MachineCode(64, 0, 0, 0, 500, {"HGMMA": 4}, loop=replace(SERIAL, waits=1)), 4096, 0)
    found = compile_report.problems(CASES["fine"], replace(fine, **change))
    assert [bool(re.search(says, one)) for one in found] == ([True] if says else [])


def test_strides_known_to_be_1_are_constants_of_a_tuple():
    case = CompileCase(
        "x", print, {"X": "*fp32", "x_strides": ("i32", "i32", "1"), "n": "i32", "BLOCK_M": "constexpr"}, {},
        ("X", "x_strides"), {90: LaunchConfig(16, 16, 4, 1)}, tiles=("BLOCK_M",),
    )  # fmt: skip
    signature, constants, divisors = aot._specialized(case, 90)
    assert signature["x_strides"] == ("i32", "i32", "constexpr")
    assert constants == {"BLOCK_M": 16, (1, 2): 1}
    assert set(divisors) == {(0,), (1, 0), (1, 1)}


def test_a_kernel_that_loses_nan_is_found_in_its_ptx():
    assert compile_case(replace(CASES["row"], ptx=("max.NaN.f32",)), 90).absent == ("max.NaN.f32",)
    assert compile_case(replace(CASES["row"], ptx=("ld.global",)), 90).absent == ()


def test_a_case_checks_that_its_parts_fit():
    good = {"name": "x", "kernel": print, "launch": {80: LaunchConfig(16, 16, 4, 1)}, "divisible": ()}
    signature = {"a": "*fp32", "BLOCK_M": "constexpr", "BLOCK_N": "constexpr"}
    CompileCase(signature=signature, constexprs={}, **good)
    with pytest.raises(ValueError, match=r"without value: \['D'\]"):
        CompileCase(signature={**signature, "D": "constexpr"}, constexprs={}, **good)
    with pytest.raises(ValueError, match=r"divisible names \['b'\]"):
        CompileCase(signature=signature, constexprs={}, **{**good, "divisible": ("a", "b")})
    with pytest.raises(ValueError, match="architectures"):
        CompileCase(signature=signature, constexprs={}, **{**good, "launch": {75: LaunchConfig(16, 16, 4, 1)}})


ROW = {
    "tile": [64, 32], "warps": 4, "stages": 2, "registers": 100, "shared_bytes": 8192, "instructions": 1000,
    "loop_instructions": 200, "matrix": {"HGMMA": 4}, "matrix_work": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registers": 108}, None),
        ({"registers": 90, "instructions": 10}, None),  # better
        ({"registers": 109}, "k on sm_90: registers was 100, is 109"),
        ({"shared_bytes": 9217}, "k on sm_90: shared_bytes was 8192, is 9217"),
        ({"instructions": 1051}, "k on sm_90: instructions was 1000, is 1051"),
        ({"matrix": {"HGMMA": 8}}, None),
        ({"matrix": {"HMMA": 64}}, "k on sm_90: matrix opcodes was ['HGMMA'], is ['HMMA']"),
        ({"matrix_work": 1.67}, "k on sm_90: matrix_work was 1.0, is 1.67"),
        ({"matrix_work": None}, None),
        ({"warps": 8}, "k on sm_90: warps was 4, is 8"),
    ],
)
def test_worse_than_recorded_beyond_the_slack_is_a_difference(change, says):
    found = compile_report.differences({("k", 90): ROW}, {("k", 90): {**ROW, **change}})
    assert [str(one) for one in found] == ([says] if says else [])


def test_rows_that_appear_or_vanish_are_differences():
    (new,) = compile_report.differences({}, {("k", 90): ROW})
    assert str(new) == "k on sm_90: row was absent, is compiled"
    (old,) = compile_report.vanished({("k", 90): ROW, ("k", 80): ROW}, [("k", 80)])
    assert str(old) == "k on sm_90: row was recorded, is gone"


def test_the_table_survives_a_round_trip_and_knows_its_compiler(tmp_path):
    rows = {("b", 90): ROW, ("a", 80): ROW, ("a", 100): ROW}
    path = tmp_path / "report.json"
    compile_report.save(rows, path)
    assert compile_report.load(path) == rows
    path.write_text(json.dumps({**json.loads(path.read_text()), "triton": "0.0"}))
    with pytest.raises(ValueError, match=r"made with triton 0\.0.*--update"):
        compile_report.load(path)


def gate(jobs: list[tuple[str, int]]) -> None:
    """Compile and hold against the committed table. The message of a failure names the command that refreshes it."""
    rows, wrong = compile_report.compile_rows(all_cases(), jobs, workers=min(8, usable_cores()))
    worse = [str(one) for one in compile_report.differences(compile_report.load(), rows)]
    assert not wrong + worse, "\n".join([*wrong, *worse, f"if this is intended: {compile_report.REFRESH}"])


def test_the_table_has_a_row_for_each_case_and_no_other():
    assert set(compile_report.load()) == set(compile_report.jobs(all_cases()))


def test_every_recorded_row_is_free_of_spills_and_of_serialized_matrix_instructions():
    rows = compile_report.load()
    assert not {job for job, row in rows.items() if row["spills"]}
    assert not {job: row["remarks"] for job, row in rows.items() if row.get("remarks")}
    hopper = {job: row for job, row in rows.items() if any(name.endswith("GMMA") for name in row["matrix"])}
    assert len(hopper) > 50 and all("waits" in row for row in hopper.values() if "loop_instructions" in row)


def test_the_specialized_kernels_copy_by_the_copy_engine():
    rows = {job: row for job, row in compile_report.load().items() if "specialized" in job[0]}
    assert {arch for _, arch in rows} == {90, 100}
    assert all(row["tma"] >= 3 and row["async_copies"] == 0 for row in rows.values())


def test_some_kernels_compile_as_recorded():
    gate([("dense forward bf16 d64", 80), ("dense forward bf16 d128", 90), ("dense forward bf16 d128", 100)])


def test_the_source_of_a_row_is_what_decides_its_machine_code():
    case = CASES["fine"]
    key = aot.source_key(case, 90)
    assert key == aot.source_key(replace(case, name="another name"), 90)
    assert key != aot.source_key(case, 100)
    stages = {90: replace(case.launch[90], num_stages=case.launch[90].num_stages + 1)}
    assert key != aot.source_key(replace(case, launch=stages, opcodes={}), 90)
    recorded = {("fine", 90): {"source": key}, ("fine", 100): {"source": "other"}}
    jobs = [("fine", 80), ("fine", 90), ("fine", 100)]
    assert compile_report.changed([case], recorded, jobs) == [("fine", 80), ("fine", 100)]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiles everything after a change of the launch tables
def test_changed_kernels_and_a_sample_of_the_others_compile_as_recorded():
    every = compile_report.jobs(all_cases())
    changed = compile_report.changed(all_cases(), compile_report.load(), every)
    others = [job for job in every if job not in changed]
    gate([*changed, *others[::16]])
