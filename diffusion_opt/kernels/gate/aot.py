"""Compile kernels for GPUs that are not there, and read what came out.

Triton needs a GPU to run a kernel, not to compile one: given the argument types and a target it goes through its own
passes, LLVM and `ptxas` to machine code, and the tools of its wheel print that (`cuobjdump`). So what a user would meet
on a Hopper or a Blackwell is checked on any Linux machine: does it compile, do registers spill, does it use the fast
matrix units.

    compiled = compile_case(case, arch=90)       # here and now; raises what the compiler raises
    results = compile_all(jobs)                  # in worker processes: a crash is a result, not the end

Workers, because (1) a failing pass of the compiler can end its process, (2) a kernel decorated under TRITON_INTERPRET=1
cannot be compiled, so the workers run without that variable, and (3) compilation uses one core. A worker that dies
leaves its standard error, with the compiler's own complaint (MLIR prints it there and raises only "PassManager::run
failed"); it becomes the message of a `Failure`, and another worker goes on.

Compiled kernels and what was read off them are kept, in `TRITON_CACHE_DIR` if set, else in the user's cache folder, so
only what has changed is compiled again.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from diffusion_opt.kernels.gate import sass
from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.gate.sass import WARP, Loop, MachineCode

if TYPE_CHECKING:
    from triton.compiler import ASTSource

PACKAGE_CASES = "diffusion_opt.kernels.gate.cases:all_cases"
Job = tuple[str, int]  # name of a case, architecture


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel compiled for an architecture."""

    name: str
    arch: int
    code: MachineCode
    shared_bytes: int  # of one program
    tensor_memory_columns: int  # of 512; sm_100 only
    remarks: tuple[str, ...] = ()  # of ptxas, on kernels with asynchronous matrix instructions (sm_90)
    absent: tuple[str, ...] = ()  # instructions the case asks for that are not in the PTX
    source: str = ""  # `source_key` of what was compiled


@dataclass(frozen=True, slots=True)
class Failure:
    """A kernel that did not compile, and why: the compiler's own words."""

    name: str
    arch: int
    reason: str


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compile a case for an architecture in this process.

    Raises what `source_of` raises, and whatever Triton raises when compilation fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(case, arch)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    code = machine_code(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Compiled(
        case.name,
        arch,
        code,
        kernel.metadata.shared,
        getattr(kernel.metadata, "tmem_size", 0) or 0,
        remarks(ptx, arch) if code.asynchronous_products else (),
        tuple(name for name in case.ptx if not re.search(rf"^\s*(@\S+\s+)?{re.escape(name)}", ptx, re.MULTILINE)),
        source_key(case, arch),
    )


def source_key(case: CompileCase, arch: int) -> str:
    """A digest of all that decides the machine code, but for Triton's version.

    That is the kernel's source and place in its file, the functions it calls, types, constants, and launch options.
    Raises what `source_of` raises.
    """
    source, options = source_of(case, arch)
    return hashlib.sha256(f"{source.hash()} {sorted(options.items())} {arch}".encode()).hexdigest()[:16]


def source_of(case: CompileCase, arch: int) -> tuple["ASTSource", dict[str, int]]:
    """What Triton compiles of a case for an architecture, and its options.

    Raises ValueError if the case has no launch choice for it, if its signature is not the kernel's, or if the kernel
    was decorated for the interpreter.
    """
    import triton
    from triton.compiler import ASTSource

    if arch not in case.launch:
        raise ValueError(f"{case.name} has no launch choice for sm_{arch}, only for {sorted(case.launch)}")
    if not isinstance(case.kernel, triton.JITFunction):
        raise ValueError(f"{case.name}: the kernel was decorated with TRITON_INTERPRET=1; unset it and start anew")
    names = list(case.signature)
    if names != case.kernel.arg_names:
        raise ValueError(f"{case.name}: the signature has {names}, the kernel takes {case.kernel.arg_names}")
    choice = case.launch[arch]
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
    return ASTSource(case.kernel, *_specialized(case, arch)), options


def _specialized(case: CompileCase, arch: int) -> tuple[dict, dict, dict]:
    """Signature, constants and known divisors in Triton's terms, where an element of a tuple is named by two places."""
    signature, constants, divisors = {}, dict(case.constants(arch)), {}
    for i, (name, kind) in enumerate(case.signature.items()):
        parts = (kind,) if isinstance(kind, str) else kind
        paths = [(i,)] if isinstance(kind, str) else [(i, j) for j in range(len(parts))]
        constants |= {path: 1 for path, part in zip(paths, parts, strict=True) if part == "1"}
        if name in case.divisible:
            divisible = [path for path, part in zip(paths, parts, strict=True) if part[0] == "*" or part == "i32"]
            divisors |= {path: [["tt.divisibility", 16]] for path in divisible}
        known = tuple("constexpr" if part == "1" else part for part in parts)
        signature[name] = known[0] if isinstance(kind, str) else known
    return signature, constants, divisors


def remarks(ptx: str, arch: int) -> tuple[str, ...]:
    """The numbered remarks on performance that ptxas makes on a kernel (C7515: matrix instructions are serialized).

    Triton drops what ptxas prints, so it is run once more, and its answer kept beside the machine code.
    """
    from triton import knobs

    path = cache_folder() / "remarks" / f"{hashlib.sha256(f'{arch} {ptx}'.encode()).hexdigest()}.json"
    if path.is_file():
        return tuple(json.loads(path.read_text()))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", f"sm_{arch}a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = tuple(sorted(set(re.findall(r"\((C75\d\d)\)", said.stdout + said.stderr))))
    _keep(path, found)
    return found


def _keep(path: Path, answer: Any) -> None:
    """Write a JSON file of the cache so that another process sees the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(answer))
    fresh.replace(path)


def machine_code(cubin: bytes) -> MachineCode:
    """What a compiled kernel uses. Kept in the cache folder under a digest of the kernel and of the reader's source."""
    digest = hashlib.sha256(cubin + Path(sass.__file__).read_bytes()).hexdigest()
    path = cache_folder() / "machine_code" / f"{digest}.json"
    if path.is_file():
        return _code_from_json(json.loads(path.read_text()))
    code = sass.read_sass(disassemble(cubin))
    _keep(path, asdict(code))
    return code


def disassemble(cubin: bytes) -> str:
    """The machine code and resources of a compiled kernel as text, by the `cuobjdump` of Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(
    jobs: Iterable[Job],
    cases_from: str = PACKAGE_CASES,
    workers: int = 2,
    report: Callable[[Compiled | Failure], None] | None = None,
) -> list[Compiled | Failure]:
    """Compile jobs in worker processes; the results are in the order of the jobs.

    `cases_from` is "module:function" for the function that gives the cases; `report` is called with each result as it
    comes, from one thread at a time or several.
    """
    ordered = list(jobs)
    queue: SimpleQueue[tuple[int, Job]] = SimpleQueue()
    for numbered in enumerate(ordered):
        queue.put(numbered)
    results: dict[int, Compiled | Failure] = {}

    def work() -> None:
        worker = _Worker(cases_from)
        try:
            while True:
                number, job = queue.get_nowait()
                results[number] = worker.compile(*job)
                if report is not None:
                    report(results[number])
        except Empty:
            return
        finally:
            worker.close()

    count = max(1, min(workers, len(ordered)))
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
    return [results[number] for number in range(len(ordered))]


class _Worker:
    """A process that compiles one job after the other, and is replaced when it dies."""

    def __init__(self, cases_from: str) -> None:
        self.cases_from = cases_from
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()
        self.process: subprocess.Popen | None = None

    def compile(self, name: str, arch: int) -> Compiled | Failure:
        if self.process is None:
            self.process = self._start()
        self.errors.seek(0)
        self.errors.truncate()
        with suppress(BrokenPipeError):  # it died while idle: then it does not answer either, see below
            self.process.stdin.write(json.dumps([name, arch]) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return _from_json(json.loads(answer))
        code = self.process.wait()
        self.close_process()
        self.errors.seek(0)
        return Failure(name, arch, complaint(self.errors.read()) or f"the compiler ended with exit code {code}")

    def _start(self) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(cache_folder())
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "diffusion_opt.kernels.gate.aot", self.cases_from]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def close_process(self) -> None:
        if self.process is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def close(self) -> None:
        self.close_process()
        self.errors.close()


def complaint(stderr: str) -> str:
    """What a compiler that died had to say: its errors, and the last line of the traceback."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or "Assertion" in line or line.startswith("ptxas ")]
    last = [line for line in lines[-1:] if line not in errors]
    return "\n".join(dict.fromkeys([*errors[:4], *last]))


def cache_folder() -> Path:
    """Where compiled kernels are kept: TRITON_CACHE_DIR, or a folder of ours in the user's cache."""
    if "TRITON_CACHE_DIR" in os.environ:
        return Path(os.environ["TRITON_CACHE_DIR"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "diffusion_opt" / "triton"


def _from_json(answer: dict[str, Any]) -> Compiled:
    tuples = {name: tuple(answer[name]) for name in ("remarks", "absent")}
    return Compiled(**{**answer, **tuples, "code": _code_from_json(answer["code"])})


def _code_from_json(code: dict[str, Any]) -> MachineCode:
    return MachineCode(**{**code, "loop": Loop(**code["loop"]) if code["loop"] else None})


def _serve(cases_from: str) -> None:
    """Answer jobs, one JSON line each, until there are no more. What the compiler prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, function = cases_from.partition(":")
    cases = {case.name: case for case in getattr(importlib.import_module(module), function)()}
    for line in sys.stdin:
        name, arch = json.loads(line)
        print(json.dumps(asdict(compile_case(cases[name], arch))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
