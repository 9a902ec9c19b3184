"""Set up `.venv`: one command, Python's standard library only, nothing done twice.

    python3 tools/install.py                 make .venv, or do nothing if it is current
    python3 tools/install.py --force         rebuild it from nothing
    python3 tools/install.py --torch cuda    the CUDA build of torch (about 3 GB) even if no NVIDIA driver is seen
    python3 tools/install.py --torch cpu     the CPU build (about 200 MB) even if one is

Why not plain pip: on Linux, pip's ordinary torch brings gigabytes of CUDA libraries whether there is a GPU or not.
So torch goes first, from the first source that has it: a folder of wheels that pip is configured to search; else the
ordinary index where it is the right build (an NVIDIA driver answers, or the system is not Linux); else PyTorch's own
index of CPU wheels. Everything else then comes from the index pip is configured with, at the versions of
constraints.txt. A stamp in .venv remembers what was installed, so the next call returns at once.
"""

from __future__ import annotations  # an old Python must get as far as the message that it is too old

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 14)
# The CPU build for Linux is published nowhere else. Used only if no local wheel serves, and only for torch itself.
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


class InstallError(Exception):
    """What went wrong and what to do about it, in one line."""


def run_pip(python: Path, arguments: list[str], log: Path) -> bool:
    """Run pip, its output into `log`; on a terminal show what it is at. True if it succeeded."""
    command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    live = sys.stdout.isatty()
    with log.open("a", encoding="utf-8") as record:
        record.write("\n$ " + " ".join(command) + "\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            record.write(line)
            if live and line.strip().startswith(("Collecting", "Downloading", "Installing", "Building")):
                width = shutil.get_terminal_size().columns - 8
                print("\r\033[K      " + line.strip()[:width], end="", flush=True)
        status = process.wait()
    if live:
        print("\r\033[K", end="", flush=True)
    return status == 0


def has_nvidia_driver() -> bool:
    """Whether nvidia-smi exists and finds a working driver."""
    if shutil.which("nvidia-smi") is None:
        return False
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.run(["nvidia-smi"], check=False, **quiet).returncode == 0


def torch_attempts(pin: str, choice: str, linux: bool, driver: bool) -> list[list[str]]:
    """The pip calls to try for torch, in order; the first that succeeds wins."""
    local = ["install", "--no-index", "--no-deps", pin]
    ordinary = ["install", pin]
    cpu_only = ["install", "--no-deps", "--retries", "1", "--timeout", "15", "-i", CPU_WHEELS, pin]
    if choice == "cuda":
        return [["install", "--force-reinstall", pin]]
    if not linux or (choice == "auto" and driver):
        return [local, ordinary]
    if choice == "cpu":
        cpu_only.insert(1, "--force-reinstall")
    return [local, cpu_only]


def install_torch(run, pin: str, choice: str, linux: bool, driver: bool) -> None:
    """Put torch into the environment; `run(pip arguments) -> bool` does the work. Raises InstallError."""
    attempts = torch_attempts(pin, choice, linux, driver)
    if not any(run(attempt) for attempt in attempts):
        hint = "check the network and pip's settings (`pip config list`)"
        if linux and choice != "cuda" and not driver:
            hint = (
                "the CPU build comes from a folder of wheels that pip is told to search, or from "
                f"{CPU_WHEELS}; if neither can be reached, `--torch cuda` takes the ordinary build (about 3 GB)"
            )
        raise InstallError(f"pip found no {pin}: {hint}")


def read_pin(constraints: str, name: str) -> str:
    """`name==version` as constraints.txt has it, without its marker. Raises InstallError if it is not there."""
    match = re.search(rf"^{re.escape(name)}==([^\s;]+)", constraints, flags=re.MULTILINE)
    if match is None:
        raise InstallError(f"constraints.txt has no line `{name}==…`; restore the file or run `make lock`")
    return match.group(0)


def fingerprint(root: Path) -> str:
    """What the environment depends on: the two lists of packages, this file, and where the repository lies."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("pyproject.toml", "constraints.txt", "tools/install.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_current(venv: Path, mark: str, choice: str) -> bool:
    """Whether the stamp in `venv` says that this very set was installed, with the build of torch now asked for."""
    stamp = venv / "diffusion-opt-stamp.json"
    if not stamp.exists() or not venv_python(venv).exists():
        return False
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return found.get("fingerprint") == mark and choice in ("auto", found.get("torch"))


def venv_version(venv: Path) -> str:
    """The Python that `venv` was made with, such as "3.11.7"; "" if there is none."""
    settings = venv / "pyvenv.cfg"
    if not venv_python(venv).exists() or not settings.exists():
        return ""
    match = re.search(r"^version\s*=\s*(\S+)", settings.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return match.group(1) if match else ""


def make_venv(venv: Path, rebuild: bool) -> None:
    """Create `venv` if it is missing, broken, of another Python, or to be rebuilt. Raises InstallError with the fix."""
    if venv_version(venv) == sys.version.split()[0] and not rebuild:
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise InstallError(f"this Python cannot make environments; on Debian: sudo apt install python{version}-venv")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=False)
    if made.returncode != 0:
        raise InstallError(f"`python -m venv {venv.name}` failed with status {made.returncode}; its message is above")


def install(venv: Path, choice: str, rebuild: bool, mark: str) -> None:
    """The three steps. Raises InstallError."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise InstallError(
            f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed, this is {sys.version.split()[0]} ({sys.executable}); "
            "name another with `make install PYTHON=python3.12`"
        )
    began = time.monotonic()
    pin = read_pin((ROOT / "constraints.txt").read_text(encoding="utf-8"), "torch")
    print(f"[1/3] environment .venv, Python {sys.version.split()[0]}", flush=True)
    make_venv(venv, rebuild)
    stamp, log, python = venv / "diffusion-opt-stamp.json", venv / "install.log", venv_python(venv)
    stamp.unlink(missing_ok=True)
    log.write_text("", encoding="utf-8")

    def run(arguments: list[str]) -> bool:
        return run_pip(python, arguments, log)

    print(f"[2/3] {pin}", flush=True)
    install_torch(run, pin, choice, sys.platform == "linux", has_nvidia_driver())
    print("[3/3] everything else (about 170 packages, a few minutes the first time)", flush=True)
    if not run(["install", "-e", ".[lab,plots,logs,rivals,docs,test]", "-c", "constraints.txt"]):
        output = log.read_text(encoding="utf-8").rpartition("\n$ ")[2]
        reason = next((line for line in output.splitlines() if line.startswith("ERROR")), "no message")
        raise InstallError(f"pip failed: {reason}; all of its output is in .venv/{log.name}")
    stamp.write_text(json.dumps({"fingerprint": mark, "torch": choice}), encoding="utf-8")
    print(f"ready in {time.monotonic() - began:.0f} s; next: make demo, make lab, or .venv/bin/diffusion-opt doctor")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tools/install.py"
    )
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto", help="which build of torch")
    parser.add_argument("--force", action="store_true", help="rebuild .venv from nothing")
    options = parser.parse_args(arguments)
    venv, mark = ROOT / ".venv", fingerprint(ROOT)
    if not options.force and is_current(venv, mark, options.torch):
        print(".venv is current")
        return 0
    try:
        install(venv, options.torch, options.force, mark)
    except InstallError as error:
        print(f"tools/install.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the next call starts over where needed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
