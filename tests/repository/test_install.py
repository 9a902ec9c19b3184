"""The installer's decisions, with pip replaced by a recorder: no environment is made and nothing is fetched."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIN = "torch==9.9.9"


@pytest.fixture
def installer():
    spec = importlib.util.spec_from_file_location("tools_install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RecordedPip:
    """Stands for pip: succeeds where `works(arguments)` says so, and remembers every call."""

    def __init__(self, works):
        self.works, self.calls = works, []

    def __call__(self, arguments):
        self.calls.append(arguments)
        return self.works(arguments)


def is_local(arguments):
    return "--no-index" in arguments


def test_a_local_wheel_is_tried_first_and_ends_the_search(installer):
    pip = RecordedPip(is_local)
    installer.install_torch(pip, PIN, "auto", linux=True, driver=False)
    assert len(pip.calls) == 1 and is_local(pip.calls[0]) and PIN in pip.calls[0]


def test_linux_without_a_driver_never_meets_the_ordinary_index(installer):
    pip = RecordedPip(lambda arguments: installer.CPU_WHEELS in arguments)
    installer.install_torch(pip, PIN, "auto", linux=True, driver=False)
    assert len(pip.calls) == 2
    for call in pip.calls:
        assert is_local(call) or installer.CPU_WHEELS in call


@pytest.mark.parametrize(("linux", "driver"), [(True, True), (False, False), (False, True)])
def test_the_ordinary_index_serves_a_driver_and_other_systems(installer, linux, driver):
    pip = RecordedPip(lambda arguments: not is_local(arguments))
    installer.install_torch(pip, PIN, "auto", linux=linux, driver=driver)
    assert pip.calls[-1] == ["install", PIN]


def test_forced_builds(installer):
    cpu = installer.torch_attempts(PIN, "cpu", linux=True, driver=True)
    assert all(is_local(call) or installer.CPU_WHEELS in call for call in cpu)
    (cuda,) = installer.torch_attempts(PIN, "cuda", linux=True, driver=False)
    assert "--force-reinstall" in cuda and installer.CPU_WHEELS not in cuda and not is_local(cuda)


@pytest.mark.parametrize(
    ("choice", "linux", "hint"), [("auto", True, "--torch cuda"), ("cuda", True, "network"), ("auto", False, "network")]
)
def test_failure_says_what_to_do_in_one_line(installer, choice, linux, hint):
    with pytest.raises(installer.InstallError, match=hint) as error:
        installer.install_torch(RecordedPip(lambda arguments: False), PIN, choice, linux=linux, driver=False)
    assert "\n" not in str(error.value) and PIN in str(error.value)


def test_pin_is_read_from_constraints(installer):
    assert installer.read_pin("torchmetrics==1.0\ntorch==2.3.4 ; sys_platform == 'linux'\n", "torch") == "torch==2.3.4"
    with pytest.raises(installer.InstallError, match="no line `torch==…`"):
        installer.read_pin("torchmetrics==1.0\n", "torch")


@pytest.fixture
def venv(installer, tmp_path):
    """A folder that looks like an environment installed for mark "m"."""
    python = installer.venv_python(tmp_path)
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "diffusion-opt-stamp.json").write_text(json.dumps({"fingerprint": "m", "torch": "auto"}))
    return tmp_path


def test_stamp_decides_whether_anything_is_done(installer, venv):
    assert installer.is_current(venv, "m", "auto")
    assert not installer.is_current(venv, "other", "auto")
    assert not installer.is_current(venv, "m", "cuda")
    (venv / "diffusion-opt-stamp.json").write_text("{ cut off")
    assert not installer.is_current(venv, "m", "auto")


def test_environment_without_its_python_is_not_current(installer, venv):
    installer.venv_python(venv).unlink()
    assert not installer.is_current(venv, "m", "auto")


def test_fingerprint_follows_the_lists_and_the_place(installer, tmp_path):
    def copy_to(folder):
        for name in ("pyproject.toml", "constraints.txt", "tools/install.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
        return folder

    one, two = copy_to(tmp_path / "one"), copy_to(tmp_path / "two")
    before = installer.fingerprint(one)
    assert before == installer.fingerprint(one) != installer.fingerprint(two)
    (one / "constraints.txt").write_text("torch==1\n")
    assert installer.fingerprint(one) != before


def test_environment_of_another_python_is_made_anew(installer, venv, monkeypatch):
    made = []
    monkeypatch.setattr(
        installer.subprocess, "run", lambda command, check: made.append(command) or SimpleNamespace(returncode=0)
    )
    (venv / "pyvenv.cfg").write_text(f"home = x\nversion = {sys.version.split()[0]}\n")
    installer.make_venv(venv, rebuild=False)
    assert not made
    (venv / "pyvenv.cfg").write_text("home = x\nversion = 3.9.1\n")
    installer.make_venv(venv, rebuild=False)
    assert len(made) == 1 and "--clear" in made[0]


def test_missing_ensurepip_names_the_debian_package(installer, tmp_path, monkeypatch):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(installer.InstallError, match=r"sudo apt install python3\.\d+-venv"):
        installer.make_venv(tmp_path / "venv", rebuild=False)


def test_unsupported_python_is_named_and_nothing_is_made(installer, tmp_path, monkeypatch):
    monkeypatch.setattr(installer, "OLDEST", (3, 99))
    with pytest.raises(installer.InstallError, match="is needed, this is 3"):
        installer.install(tmp_path / "venv", "auto", False, "m")
    assert not (tmp_path / "venv").exists()


def test_failed_pip_leaves_no_stamp_and_names_the_log(installer, tmp_path, monkeypatch):
    def failing_pip(python, arguments, log):
        with log.open("a") as record:
            record.write(f"\n$ pip {arguments}\nERROR: {'no such thing' if '-c' in arguments else 'no torch here'}\n")
        return "-c" not in arguments

    monkeypatch.setattr(installer, "make_venv", lambda venv, rebuild: venv.mkdir())
    monkeypatch.setattr(installer, "run_pip", failing_pip)
    with pytest.raises(installer.InstallError, match=r"ERROR: no such thing; .*install\.log"):
        installer.install(tmp_path / "venv", "auto", False, "m")
    assert not (tmp_path / "venv" / "diffusion-opt-stamp.json").exists()


def test_success_leaves_a_stamp_that_makes_the_next_call_a_no_op(installer, tmp_path, monkeypatch):
    venv = tmp_path / "venv"

    def make(venv, rebuild):
        installer.venv_python(venv).parent.mkdir(parents=True)
        installer.venv_python(venv).touch()

    monkeypatch.setattr(installer, "make_venv", make)
    monkeypatch.setattr(installer, "run_pip", lambda python, arguments, log: True)
    installer.install(venv, "cpu", False, "m")
    assert installer.is_current(venv, "m", "cpu") and installer.is_current(venv, "m", "auto")


def test_pip_runner_reports_the_status_and_keeps_the_output(installer, tmp_path):
    log = tmp_path / "install.log"
    assert installer.run_pip(Path(sys.executable), ["--version"], log)
    assert not installer.run_pip(Path(sys.executable), ["no-such-command"], log)
    assert "pip" in log.read_text() and "no-such-command" in log.read_text()


@pytest.mark.skipif(os.name == "nt", reason="writes a shell script to stand for nvidia-smi")
@pytest.mark.parametrize(("status", "found"), [(0, True), (9, False)])
def test_driver_counts_only_if_nvidia_smi_succeeds(installer, tmp_path, monkeypatch, status, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert installer.has_nvidia_driver() is found


def test_help_teaches_and_needs_nothing_installed():
    command = [sys.executable, "-S", str(ROOT / "tools" / "install.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("--torch cuda", "--force", "CPU wheels", "constraints.txt"):
        assert word in text
