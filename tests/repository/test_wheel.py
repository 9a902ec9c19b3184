"""Installed without the repository: the wheel serves a user's own pipelines, and says where the shipped models are.

The wheel goes into a fresh environment that sees the packages of this one by a path file, so nothing is downloaded and
nothing is imported from the checkout.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import tiny_pipeline

import diffusion_opt

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    copy = tmp_path_factory.mktemp("source")  # a build leaves folders behind
    for name in ("diffusion_opt", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run(command, cwd=copy, check=True, timeout=300)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """The commands of an environment that holds the wheel alone, and beside it the packages of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    bin = folder / ("Scripts" if os.name == "nt" else "bin")
    target = subprocess.run(
        [bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    command = [sys.executable, "-m", "pip", "--python", str(bin / "python"), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    (Path(target) / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin


def run(installed: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DIFFUSION_OPT_DATA")}
    return subprocess.run(
        [installed / "diffusion-opt", *arguments], cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_wheel_holds_every_module_and_every_table(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("diffusion_opt/")}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "diffusion_opt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == here


def test_it_is_the_installed_one_that_runs(installed, tmp_path):
    assert run(installed, "--version", cwd=tmp_path).stdout == f"diffusion-opt {diffusion_opt.__version__}\n"
    code = "import diffusion_opt; print(diffusion_opt.__file__)"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [installed / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=kept, check=True
    )
    assert str(installed.parent) in found.stdout


def test_it_serves_a_pipeline_of_the_user(installed, tmp_path):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "mine")
    done = run(
        installed, "generate", "mine", "--prompts", "a cat", "--height", "32", "--width", "32", "--steps", "2",
        "--out", "pictures", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "pictures" / "0-a-cat.png").size == (32, 32)


def test_it_says_where_the_shipped_models_are(installed, tmp_path):
    done = run(installed, "generate", "fashion", "--prompts", "bag", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "Set DIFFUSION_OPT_DATA to that folder of a clone" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    data = str(ROOT / "data")
    done = run(installed, "generate", "fashion-4step", "--prompts", "bag", "--out", "out", cwd=tmp_path,
               DIFFUSION_OPT_DATA=data)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "0-bag.png").size == (28, 28)
