"""The doctor: right about a healthy machine, and clear about each kind of broken one."""

import importlib
import io
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from diffusion_opt import doctor
from diffusion_opt.datasets import write_sums


def render(diagnosis: doctor.Diagnosis) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    doctor.print_report(diagnosis, console)
    return console.file.getvalue()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with one small intact folder, the only one expected."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(100)))
    write_sums(folder)
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    monkeypatch.setattr(doctor, "expected_folders", lambda: {"models/tiny"})
    return tmp_path


def test_this_machine_is_well_and_the_report_says_what_next():
    diagnosis = doctor.diagnose()
    assert diagnosis.exit_code == 0, [finding for finding in diagnosis.broken]
    text = render(diagnosis)
    for word in ("python", "torch build", torch.__version__, "fashion-mnist", "What to expect", "make demo"):
        assert word in text


def test_every_shipped_model_is_expected():
    expected = doctor.expected_folders()
    assert "fashion-mnist" in expected and "models/fashion" in expected


def test_intact_folder(data):
    assert [(finding.subject, finding.level) for finding in doctor.check_shipped_files()] == [("models/tiny", "ok")]


def test_damaged_weights_are_named(data):
    (data / "models" / "tiny" / "weights.bin").write_bytes(b"short")
    (finding,) = doctor.check_shipped_files()
    assert finding.level == "broken" and "weights.bin" in finding.found and "git checkout" in finding.advice


def test_missing_folder_is_named(data):
    shutil.rmtree(data / "models" / "tiny")
    (finding,) = doctor.check_shipped_files()
    assert (finding.subject, finding.level) == ("models/tiny", "broken")


def test_missing_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path / "nowhere"))
    (finding,) = doctor.check_shipped_files()
    assert finding.level == "broken" and "nowhere" in finding.found


def test_packages_against_the_tested_versions(monkeypatch):
    versions = {"torch": "2.0.0+cpu", "diffusers": "1.5"}

    def version(name):
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = {finding.subject: finding for finding in doctor.check_packages({"torch": "2.0.0", "diffusers": "1.4"})}
    assert findings["torch"].level == "ok"
    assert findings["diffusers"].level == "note" and "tested with 1.4" in findings["diffusers"].found
    assert findings["onnx"].level == "broken" and findings["jupyterlab"].level == "note"


def test_tested_versions_reads_pins_and_markers(tmp_path):
    file = tmp_path / "constraints.txt"
    file.write_text("# a comment\ntorch==2.0\ntriton==3.0 ; sys_platform == 'linux'\n")
    assert doctor.tested_versions(file) == {"torch": "2.0", "triton": "3.0"}
    assert doctor.tested_versions(tmp_path / "none.txt") == {}


@pytest.mark.parametrize("error", [ImportError("gone"), OSError("libonnx.so: cannot open")])
def test_a_package_that_cannot_be_imported_is_broken(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    findings = {finding.subject: finding for finding in doctor.check_silent_helpers()}
    assert findings["onnx import"].level == "broken" and str(error) in findings["onnx import"].found
    assert "attention quantizers" in findings["onnx import"].advice


@pytest.mark.parametrize(("policy", "level"), [("PASSIVE", "ok"), ("active", "note"), (None, "note")])
def test_waiting_threads(policy, level):
    assert doctor.check_waiting(policy).level == level


@pytest.mark.parametrize(("free_gb", "level"), [(1, "note"), (50, "ok")])
def test_disk(monkeypatch, tmp_path, free_gb, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free_gb * 10**9))
    assert doctor.check_disk(tmp_path).level == level


@pytest.mark.parametrize(
    ("capability", "present", "absent"),
    [((8, 0), ["INT8"], ["FP8", "FP4"]), ((9, 0), ["INT8", "FP8"], ["FP4"]), ((10, 0), ["INT8", "FP8", "FP4"], [])],
)
def test_gpu_formats_follow_the_generation(capability, present, absent):
    properties = SimpleNamespace(name="X", major=capability[0], minor=capability[1], total_memory=80 * 10**9)
    found, slow = doctor.describe_gpu(properties).found, " ".join(doctor.what_is_slow(capability))
    assert "80 GB" in found and all(name in found for name in present)
    assert not any(name in found for name in absent) and all(name in slow for name in absent)


def test_a_machine_without_gpu_is_told_what_takes_long():
    text = " ".join(doctor.what_is_slow(None))
    assert "interpreter" in text and "need a GPU" in text


def test_cpu_build_beside_a_driver_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    gpu = {finding.subject: finding for finding in doctor.check_torch()}["GPU"]
    assert gpu.level == "note" and "--torch cuda" in gpu.advice


def test_a_broken_finding_sets_the_exit_code_and_the_next_step(monkeypatch):
    broken = doctor.Finding("x", "[gone]", "broken", "do [this]")
    monkeypatch.setattr(doctor, "check_shipped_files", lambda: [broken])
    monkeypatch.setattr(doctor, "check_torch", lambda: [])
    diagnosis = doctor.diagnose()
    assert diagnosis.exit_code == 1 and diagnosis.next_step == "do [this]"
    assert "[gone]" in render(diagnosis) and "1 broken" in render(diagnosis)


def test_module_is_light_to_import():
    source = importlib.util.find_spec("diffusion_opt.doctor").loader.get_source("diffusion_opt.doctor")
    head = source.partition("ROOT =")[0]
    assert "import torch" not in head and "import diffusers" not in head


def test_what_it_says_of_bfloat16_is_so_of_this_processor():
    from diffusion_opt.quantization.faster.bfloat16 import fast_here

    assert doctor.bfloat16_units() == fast_here(torch.device("cpu"))
    assert "bfloat16 is faster" in " ".join(doctor.what_is_slow(None, bfloat16=True))
    assert "bfloat16 is slower" in " ".join(doctor.what_is_slow(None, bfloat16=False))


def test_installed_without_its_repository_nothing_of_it_is_missed(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.delenv("DIFFUSION_OPT_DATA", raising=False)
    monkeypatch.setattr("diffusion_opt.names.__file__", str(tmp_path / "a" / "names.py"))
    (finding,) = doctor.check_shipped_files()
    assert finding.level == "note" and "Set DIFFUSION_OPT_DATA" in finding.found
    assert not any("make" in advice for advice in (doctor.what_next(), doctor.installer("peft")))


def test_in_a_notebook_the_next_step_is_not_to_open_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert "make lab" not in doctor.what_next()
