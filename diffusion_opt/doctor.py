"""What this machine can do: `diffusion-opt doctor`.

A wrong version, a damaged weight file or a GPU that torch cannot see shows up much later and far from its cause: as a
quantizer that is silently absent, or as a run that takes an hour instead of a minute. So the causes met in practice
are looked for here, each by trying the thing itself, and the answer says in words what will be slow and which command
to type next. Nothing is changed, nothing is downloaded, and every check works when the others fail: that is why
imports happen inside the checks, and why each catches the errors of the thing it tries.

    diagnosis = diagnose()
    print_report(diagnosis)
    sys.exit(diagnosis.exit_code)      # 0 unless something is broken
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = (
    "torch", "diffusers", "transformers", "nvidia-modelopt", "onnx", "accelerate", "peft", "safetensors",
    "torchmetrics", "ftfy",
)  # fmt: skip
OPTIONAL = {  # what each is for
    "matplotlib": "the pictures of reports",
    "tensorboard": "training curves",
    "cache-dit": "a rival in the comparison of caches",
    "jupyterlab": "the course",
    "ipywidgets": "the course",
    "nbmake": "tests",
    "pytest": "tests",
}
COMFORTABLE_MEMORY_GB = 6.0  # the test suite and one notebook side by side
COMFORTABLE_DISK_GB = 2.0  # runs/ of a training with its checkpoints
FP8_CAPABILITY, FP4_CAPABILITY = (8, 9), (10, 0)  # Ada and Hopper; Blackwell

Level = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what was found, and what to do if it is not well."""

    subject: str
    found: str
    level: Level = "ok"
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, what will be slow on this machine, and the next command to type."""

    findings: tuple[Finding, ...]
    slow: tuple[str, ...]
    next_step: str

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "broken")

    @property
    def exit_code(self) -> int:
        return 1 if self.broken else 0


def diagnose() -> Diagnosis:
    """Look at everything; a few seconds, mostly the import of torch."""
    findings = (
        *check_system(),
        *check_torch(),
        *check_packages(tested_versions(ROOT / "constraints.txt")),
        *check_silent_helpers(),
        check_waiting(os.environ.get("OMP_WAIT_POLICY")),
        *check_shipped_files(),
        check_disk(Path.cwd()),
    )
    broken = [finding for finding in findings if finding.level == "broken"]
    next_step = broken[0].advice if broken else what_next()
    return Diagnosis(findings, what_is_slow(gpu_capability(), bfloat16_units()), next_step)


def is_clone() -> bool:
    """Whether the package runs from its repository, with its Makefile, data and notebooks."""
    return (ROOT / "pyproject.toml").is_file()


def what_next() -> str:
    """The next thing to do where all is well."""
    if "ipykernel" in sys.modules:
        return "the next cell of this notebook"
    if is_clone():
        return "make demo    (then make lab: the course, from notebook 00)"
    return 'diffusion-opt generate MODEL --prompts "a cat"    (MODEL: a folder, or a name of the hub)'


def check_system() -> Iterator[Finding]:
    """Python, operating system, processor and memory."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        from diffusion_opt.evaluation.machine import cpu_model, total_memory_gb, usable_cores
    except (ImportError, OSError) as error:
        yield Finding("processor", f"cannot be read: {error}", "broken", "make install ARGS=--force")
        return
    cores = usable_cores()
    yield Finding("processor", f"{cpu_model()}, {cores} usable core{'s' if cores != 1 else ''}")
    memory = total_memory_gb()
    if memory is None:
        yield Finding("memory", "the system does not tell")
    elif memory < COMFORTABLE_MEMORY_GB:
        yield Finding("memory", f"{memory} GB", "note", "close other programs before `make test` or a training")
    else:
        yield Finding("memory", f"{memory} GB")


def check_torch() -> Iterator[Finding]:
    """The build of torch, its threads, and the GPUs it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch build", f"cannot be imported: {error}", "broken", "make install ARGS=--force")
        return
    yield Finding("torch build", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield describe_gpu(torch.cuda.get_device_properties(index))
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Finding("GPU", "not used: this is the CPU build of torch", "note", 'make install ARGS="--torch cuda"')
    elif torch.version.cuda is not None:
        advice = (
            f"update the NVIDIA driver (torch was built for CUDA {torch.version.cuda}), or ignore this without a GPU"
        )
        yield Finding("GPU", "none that torch can use", "note", advice)
    else:
        yield Finding("GPU", "none")


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the best GPU that torch can use, None without one."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return max((torch.cuda.get_device_capability(index) for index in devices), default=None)


def describe_gpu(properties) -> Finding:
    """Name, memory, and the low-precision arithmetic that this generation has in hardware (torch device properties)."""
    capability = (properties.major, properties.minor)
    formats = ["INT8"] + ["FP8"] * (capability >= FP8_CAPABILITY) + ["FP4"] * (capability >= FP4_CAPABILITY)
    memory_gb = properties.total_memory / 1e9
    return Finding("GPU", f"{properties.name}, {memory_gb:.0f} GB, fast in {', '.join(formats)}")


def tested_versions(constraints: Path) -> dict[str, str]:
    """Version by package name from constraints.txt; empty where the package runs without its repository."""
    if not constraints.is_file():
        return {}
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pins = (line.partition(";")[0].strip().split("==") for line in lines if "==" in line)
    return {name: version for name, version in pins}


def check_packages(tested: dict[str, str]) -> Iterator[Finding]:
    """The packages that matter: installed, and at the version tested together with the others."""
    required = (*REQUIRED, "triton") if sys.platform == "linux" else REQUIRED
    for name in (*required, *OPTIONAL):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in required:
                yield Finding(name, "not installed", "broken", installer(name))
            elif is_clone():
                yield Finding(name, f"not installed: {OPTIONAL[name]}", "note", installer(name))
            continue
        expected = tested.get(name, version)
        if version.partition("+")[0] == expected:
            yield Finding(name, version)
        else:
            yield Finding(name, f"{version}, tested with {expected}", "note", installer(name))


def installer(package: str) -> str:
    """The command that installs a package: of the clone, or of whoever installed the wheel."""
    return "make install" if is_clone() else f"pip install {package}"


def check_silent_helpers() -> Iterator[Finding]:
    """Packages whose absence or failure nobody reports: onnx for modelopt, triton for the kernels."""
    advice = "make install; without it modelopt leaves out its attention quantizers and says nothing"
    yield _importable("onnx", "onnx import", advice)
    if sys.platform == "linux":
        yield _importable("triton", "triton import", "make install; without it the Triton kernels cannot run")
    else:
        yield Finding("triton import", "no release for this system", "note", "the lessons on kernels need Linux")


def _importable(module: str, subject: str, advice: str) -> Finding:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return Finding(subject, f"fails: {error}", "broken", advice)
    return Finding(subject, "works")


def check_waiting(policy: str | None) -> Finding:
    """How idle threads of torch wait: spinning (the default) steals time from whatever else runs."""
    if policy is not None and policy.lower() == "passive":
        return Finding("OMP_WAIT_POLICY", "passive")
    found = "not set: idle threads spin" if policy is None else f"{policy}: idle threads may spin"
    return Finding("OMP_WAIT_POLICY", found, "note", "export OMP_WAIT_POLICY=passive (make does it by itself)")


def check_shipped_files() -> Iterator[Finding]:
    """Every folder of data/ that lists its checksums, checked byte by byte, and whether one is absent."""
    try:
        from diffusion_opt.datasets import data_dir
        from diffusion_opt.datasets.integrity import SUMS

        root, expected = data_dir(), expected_folders()
    except FileNotFoundError as error:
        level = "broken" if is_clone() else "note"  # a user's own pipelines need none of it
        yield Finding("shipped data", str(error), level, "needed by the demo, the course and the shipped models alone")
        return
    except (ImportError, OSError) as error:
        yield Finding("shipped data", f"cannot be checked: {error}", "broken", "make install ARGS=--force")
        return
    present = {path.parent.relative_to(root).as_posix() for path in root.rglob(SUMS)}
    for name in sorted(present | expected):
        yield check_folder(root / name, name)


def check_folder(folder: Path, name: str) -> Finding:
    """Whether the files of one folder of data/ are those its list of checksums names."""
    from diffusion_opt.datasets import CorruptFileError, verify

    try:
        verify(folder)
    except CorruptFileError as error:
        return Finding(name, str(error), "broken", "git checkout -- data")
    return Finding(name, "intact")


def expected_folders() -> set[str]:
    """The folders of data/ that the package cannot do without, relative to it."""
    from diffusion_opt.models.zoo import SHIPPED

    return {"fashion-mnist", *(f"models/{name}" for name in SHIPPED)}


def check_disk(folder: Path) -> Finding:
    """Free space where runs are written."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < COMFORTABLE_DISK_GB:
        return Finding("free disk", f"{free_gb:.1f} GB", "note", "make room before a training: it keeps checkpoints")
    return Finding("free disk", f"{free_gb:.0f} GB")


def bfloat16_units() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    try:
        import torch

        from diffusion_opt.quantization.faster.bfloat16 import fast_here
    except (ImportError, OSError):
        return False
    return fast_here(torch.device("cpu"))


def what_is_slow(capability: tuple[int, int] | None, bfloat16: bool = False) -> tuple[str, ...]:
    """In words, what to expect of a GPU of this compute capability, or of a machine without one (None).

    `bfloat16` says whether the CPU has units for it.
    """
    if capability is None:
        precision = (
            "bfloat16 is faster than float32 here, the CPU has units for it (AMX): `Bfloat16()`, or --dtype bfloat16"
            if bfloat16
            else "bfloat16 is slower than float32 here, the CPU has no units for it (AMX)"
        )
        return (
            "the demo and the notebooks are sized for a CPU with two cores",
            "training a teacher from nothing takes hours (students and micro models: minutes)",
            "Triton kernels run in Triton's interpreter: correct, but far too slow to time",
            "FLUX.2, LTX-2 and Wan at their own sizes need a GPU",
            precision,
        )
    missing = [name for name, needed in (("FP8", FP8_CAPABILITY), ("FP4", FP4_CAPABILITY)) if capability < needed]
    if missing:
        return (f"{' and '.join(missing)}: this GPU computes in a wider type, so it saves memory but no time",)
    return ("nothing in the course",)


def print_report(diagnosis: Diagnosis, console: "Console | None" = None) -> None:
    """Show the diagnosis as a table, what is slow, and the next command."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    table = Table(title="What this machine has", title_justify="left", show_header=False, box=None, pad_edge=False)
    for finding in diagnosis.findings:
        advice = f"\n[dim]-> {escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(marks[finding.level], escape(finding.subject), escape(finding.found) + advice)
    console.print(table)
    console.print("\n[bold]What to expect[/]")
    for line in diagnosis.slow:
        console.print(f"  - {escape(line)}")
    verdict = f"{len(diagnosis.broken)} broken" if diagnosis.broken else "everything needed is here"
    console.print(f"\n[bold]{verdict}[/]. Next: {escape(diagnosis.next_step)}")
