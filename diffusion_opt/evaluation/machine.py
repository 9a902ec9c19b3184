"""What a number was measured on.

A latency without its machine is not a result. `machine()` gathers what decides a timing (processor, threads, memory,
accelerator, library versions) as plain strings and numbers for the JSON of every measurement. Two measurements compare
only if these agree; `measurement.speedup` checks the part that matters. Nothing here names a host, a user or a path,
so the result can be published as it is.
"""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = ("torch", "diffusers", "nvidia-modelopt", "triton", "torchmetrics")


def machine() -> dict[str, str | int | float | dict[str, str | None] | None]:
    """Describe this machine: processor, cores, threads torch uses, memory in GB, GPU, system and versions.

    `gpu` is None without a usable CUDA device; a library that is not installed has the version None.
    """
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": total_memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_memory_gb": gpu_memory_gb(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on: a container's affinity counts, not the whole machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory_gb() -> float | None:
    """Physical memory in GB (10^9 bytes), rounded to 0.1; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def gpu_memory_gb() -> float | None:
    """Memory of the current CUDA device in GB (10^9 bytes), rounded to 0.1; None without one."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9, 1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
