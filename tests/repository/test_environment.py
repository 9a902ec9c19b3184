"""pyproject.toml, constraints.txt and environment.yml say the same thing, and the code asks for nothing else.

Three files name versions because three tools read them. None of them can be tried here against a real conda, so their
agreement is checked instead: each pin lies in its range, and each entry of environment.yml is a pin of constraints.txt.
"""

import ast
import importlib.util
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VISIBLE = {"jupyterlab", "torch", "diffusers", "nvidia-modelopt", "triton", "nbmake", "ipywidgets", "matplotlib"}


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not an exact pin"
    return specifier.version


def project_requirements() -> list[Requirement]:
    optional = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in (*PROJECT["dependencies"], *optional)]


def conda_environment() -> tuple[list[str], list[str]]:
    """The conda entries and the pip entries of environment.yml."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_section,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, str)], pip_section


@pytest.mark.parametrize("requirement", project_requirements(), ids=lambda requirement: requirement.name)
def test_each_requirement_has_a_pin_within_its_range(requirement):
    pin = constraints().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is missing from constraints.txt: run `make lock`"
    assert Version(pinned_version(pin)) in requirement.specifier
    assert str(pin.marker) == str(requirement.marker)


def test_constraints_are_bare_pins_in_order():
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(names) and len(set(names)) == len(names)
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.!]+( ; [\w\s.'=<>]+)?", line), f"not a bare pin: {line}"


def test_constraints_leave_cuda_libraries_to_torch():
    nvidia = {name for name in constraints() if name.startswith(("nvidia-", "cuda"))}
    assert nvidia == {"nvidia-modelopt", "nvidia-ml-py"}


def test_torch_and_triton_are_the_pair_that_torch_itself_asks_for():
    asked = [Requirement(line) for line in metadata.requires("torch") or []]
    triton = [requirement for requirement in asked if requirement.name == "triton"]
    if triton:  # the CPU build names no triton
        assert Version(pinned_version(constraints()["triton"])) in triton[0].specifier
    assert metadata.version("torch").partition("+")[0] == pinned_version(constraints()["torch"])


def test_conda_brings_only_python_and_pip():
    conda, _ = conda_environment()
    (python,) = [entry.partition("=")[2] for entry in conda if entry.startswith("python=")]
    assert sorted(entry.partition("=")[0] for entry in conda) == ["pip", "python"]
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


def test_environment_pins_equal_constraints():
    _, entries = conda_environment()
    pins = constraints()
    assert "-c constraints.txt" in entries and f"-e .[{','.join(PROJECT['optional-dependencies'])}]" in entries
    listed = [Requirement(entry) for entry in entries if not entry.startswith("-")]
    assert {requirement.name for requirement in listed} == VISIBLE
    for requirement in listed:
        assert pinned_version(requirement) == pinned_version(pins[requirement.name])
        assert str(requirement.marker) == str(pins[requirement.name].marker)


def test_no_address_or_absolute_path_in_the_lists():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"[a-z]+://|(^|[\s=\"'@])/", text, flags=re.MULTILINE), f"{name} holds an address or path"


# Imported where they are installed, and left out or refused with the command to install them elsewhere.
WHERE_INSTALLED = {"cache-dit", "matplotlib", "imageio-ffmpeg"}


def test_every_import_is_a_declared_requirement():
    provided = metadata.packages_distributions()
    direct = {canonicalize_name(requirement.name) for requirement in map(Requirement, PROJECT["dependencies"])}
    lab = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"]["lab"]}
    undeclared = set()
    for path in (ROOT / "diffusion_opt").rglob("*.py"):
        allowed = (direct | lab if "lesson" in path.parts else direct) | WHERE_INSTALLED
        for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            if module in sys.stdlib_module_names or module == "diffusion_opt":
                continue
            if not {canonicalize_name(name) for name in provided.get(module, [module])} & allowed:
                undeclared.add(f"{path.relative_to(ROOT)}: {module}")
    assert not undeclared, f"add to pyproject.toml, or import something else: {sorted(undeclared)}"


def imported_modules(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_lock_reads_names_extras_and_markers():
    lock = load_tool("lock")
    assert lock.parse("Foo_Bar[b, a]>=1; extra == 'x'") == ("foo-bar", frozenset({"a", "b"}), "extra == 'x'")
    assert lock.parse("plain") == ("plain", frozenset(), "")
    assert lock.wanted("python_version < '3.9'", frozenset())
    assert lock.wanted("extra == 'x'", frozenset({"x"})) and not lock.wanted("extra == 'x'", frozenset({"y"}))
    with pytest.raises(ValueError, match="cannot read the requirement"):
        lock.parse("==1.0")


def test_lock_follows_requirements_and_drops_the_build_of_torch():
    lock = load_tool("lock")
    versions = lock.closure(["torch==2.13.0"])
    assert versions["torch"] == metadata.version("torch").partition("+")[0]
    assert {"torch", "sympy", "mpmath"} <= set(versions) and "pytest" not in versions


def test_lock_names_what_is_not_installed():
    lock = load_tool("lock")
    with pytest.raises(LookupError, match="not installed here: no-such-package"):
        lock.render(["torch", "no-such-package>=1"], (3, 11, 0))


def test_lock_pins_for_every_supported_python():
    lock = load_tool("lock")
    assert lock.needs_newer(">=3.11.5,<4", (3, 11, 0)) == "3.11.5"
    for fine in ("", ">=3.9", ">=3.11", ">= 3.11.0", "!=3.11.3,>=3.8", "<3.15,>=3.10"):
        assert lock.needs_newer(fine, (3, 11, 0)) == ""
    _, oldest = lock.read_project(ROOT / "pyproject.toml")
    assert f"{oldest[0]}.{oldest[1]}" in PROJECT["requires-python"]
    for name, pin in constraints().items():
        asked = SpecifierSet(metadata.metadata(name).get("Requires-Python") or "")
        excluded = not asked.contains(Version(".".join(map(str, oldest))))
        assert excluded <= (pin.marker is not None), f"{name} cannot be installed on Python {oldest}: run `make lock`"
