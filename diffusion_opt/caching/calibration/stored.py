"""Small JSON files of the caches: calibrations and schedules, found by name or path and read strictly.

A file holds exactly the fields of one frozen dataclass. Nothing is filled in and nothing ignored: a file of another
kind, or of another version, is refused with its name and with what it should hold.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusion_opt.datasets import data_dir

SHIPPED_FOLDER = "caching"  # below the data folder


def find_stored(name: str | Path, what: str, how: str) -> Path:
    """The file of a shipped name, or at a path, or at a path below the data folder.

    Raises FileNotFoundError naming what is missing and how to make it.
    """
    shipped = data_dir() / SHIPPED_FOLDER
    places = (Path(name), data_dir() / name, shipped / f"{name}.json")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        names = ", ".join(path.stem for path in sorted(shipped.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no {what} named {name} (in {shipped} there are: {names}) and no such file: {how}")
    return found


def read_stored(owner: type, path: Path, what: str, **parts: type) -> dict[str, Any]:
    """The fields of a dataclass from a JSON file, lists as tuples; `parts` are those that are dataclasses themselves.

    Raises ValueError if the file holds anything else.
    """
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): make it anew") from error
    kept = _fields_of(owner, stored, path, what)
    return kept | {name: part(**_fields_of(part, kept[name], path, what)) for name, part in parts.items()}


def _fields_of(owner: type, stored: object, path: Path, what: str) -> dict[str, Any]:
    names = {field.name for field in fields(owner)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise ValueError(f"{path} is not a {what}: {owner.__name__} has exactly {', '.join(sorted(names))}")
    return {name: _tuples(value) for name, value in stored.items()}


def _tuples(value: object) -> object:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
