"""Write constraints.txt: the exact version of every package that the project needs, read off this environment.

pyproject.toml says which versions are acceptable; constraints.txt says which ones were tested together. The second
follows from the first: start at the project's requirements (with all extras), walk the requirements
of each installed package, and note each version met. The file holds no address and no hash, so it works with any
package index, mirror or folder of wheels, and pip accepts the CPU build of torch where the pin says `torch==2.13.0`.

NVIDIA's CUDA libraries are left out: torch's own requirements pin them, and only on machines that use them. Packages
that only another operating system or Python needs are not installed here, hence not listed; pip then picks them. A
release that asks for a later Python than the project does (3.11.5, say) is pinned only from there on.

    .venv/bin/python tools/lock.py            rewrite constraints.txt (also: make lock)
    .venv/bin/python tools/lock.py --check    only compare, exit 1 on a difference

Standard library only.
"""

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("lab", "plots", "logs", "rivals", "docs", "test")
KEPT_NVIDIA = {"nvidia-modelopt", "nvidia-ml-py"}
REQUIREMENT = re.compile(r"^\s*(?P<name>[A-Za-z0-9][\w.-]*)\s*(?:\[(?P<extras>[^\]]*)\])?[^;]*(?:;(?P<marker>.*))?$")


def canonical(name: str) -> str:
    """The name as pip compares it: lower case, one hyphen between parts."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(requirement: str) -> tuple[str, frozenset[str], str]:
    """Split `name[extra]>=1; marker` into canonical name, extras and marker text ("" if there is none)."""
    match = REQUIREMENT.match(requirement)
    if match is None:
        raise ValueError(f"cannot read the requirement {requirement!r}: expected `name[extra] >= version; marker`")
    extras = frozenset(extra.strip() for extra in (match["extras"] or "").split(",") if extra.strip())
    return canonical(match["name"]), extras, (match["marker"] or "").strip()


def wanted(marker: str, extras: frozenset[str]) -> bool:
    """Whether a requirement applies: one behind `extra == "x"` only if x was asked for.

    Markers on the Python version or platform are not evaluated: such a package is installed here or it is not.
    """
    named = re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    return not named or any(extra in extras for extra in named)


def needs_newer(python: str, oldest: tuple[int, ...]) -> str:
    """The lower bound in a Requires-Python such as `>=3.11.5,<4` if it lies above `oldest`, else ""."""
    bounds = re.findall(r">=?\s*(\d+(?:\.\d+)*)", python)
    newest = max(bounds, key=as_tuple, default="0")
    return newest if as_tuple(newest) > oldest else ""


def as_tuple(version: str) -> tuple[int, ...]:
    """`3.11` as (3, 11, 0)."""
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def closure(requirements: list[str]) -> dict[str, str]:
    """Version by canonical name of every installed package that the requirements lead to."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [(name, extras) for name, extras, _ in map(parse, requirements)]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = distribution.version.partition("+")[0]
        for requirement in distribution.requires or []:
            child, child_extras, marker = parse(requirement)
            if wanted(marker, extras):
                queue.append((child, child_extras))
    return versions


def read_project(pyproject: Path) -> tuple[list[str], tuple[int, ...]]:
    """The project's own requirements, with those of the extras `lab` and `test`, and the oldest Python it supports."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]
    return requirements, as_tuple(re.search(r">=\s*([\d.]+)", project["requires-python"])[1])


def render(requirements: list[str], oldest: tuple[int, ...]) -> str:
    """The text of constraints.txt for Pythons from `oldest` on. Raises LookupError if a requirement is missing here."""
    versions = closure(requirements)
    markers = {name: marker for name, _, marker in map(parse, requirements) if marker}
    missing = sorted({name for name, _, _ in map(parse, requirements)} - set(versions))
    if missing:
        raise LookupError(f"not installed here: {', '.join(missing)}; run `make install` on Linux first, then lock")
    lines = []
    for name, version in sorted(versions.items()):
        if name.startswith(("nvidia-", "cuda")) and name not in KEPT_NVIDIA:
            continue
        later = needs_newer(metadata.metadata(name).get("Requires-Python") or "", oldest)
        marker = markers.get(name) or (f"python_full_version >= '{later}'" if later else "")
        lines.append(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
    head = "# Written by tools/lock.py: the versions tested together. Change pyproject.toml, then `make lock`."
    return "\n".join([head, *lines]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write constraints.txt from the packages installed here.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file differs")
    arguments = parser.parse_args()
    target = ROOT / "constraints.txt"
    try:
        text = render(*read_project(ROOT / "pyproject.toml"))
    except LookupError as error:
        print(f"tools/lock.py: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        same = target.exists() and target.read_text(encoding="utf-8") == text
        print("constraints.txt agrees with this environment" if same else "constraints.txt differs: run `make lock`")
        return 0 if same else 1
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target.name}: {text.count('==')} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
