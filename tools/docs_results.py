"""Pages of the measured results: every file of `benchmarks/results` as tables, so that no number is copied by hand.

A list of rows becomes a table, a dictionary of dictionaries too; single values stand above them, the machine first.
What is nested deeper is shown in its row as short text. Numbers have four digits.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_ROWS, MOST_LETTERS = 200, 60


def results_pages(folder: Path) -> dict[str, str]:
    """One page for each JSON file of `folder`."""
    return {f"results/{path.stem}.md": result_page(path.stem, json.loads(path.read_text())) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def result_page(name: str, data: Mapping[str, Any]) -> str:
    """Title, machine, single values, and a table for each list or dictionary of rows."""
    parts = [f"# {name}", f"From `benchmarks/results/{name}.json`."]
    if machine := data.get("machine"):
        versions = ", ".join(f"{package} {version}" for package, version in machine.get("versions", {}).items())
        gpu = machine.get("gpu") or "none"
        parts.append(f"Machine: {machine.get('cpu')}, {machine.get('threads')} threads, GPU: {gpu}; {versions}.")
    single = {key: value for key, value in data.items() if not isinstance(value, Mapping | list)}
    if single:
        parts.append("\n".join(f"- {key}: {shown(value)}" for key, value in single.items()))
    for key, value in data.items():
        if key != "machine" and isinstance(value, Mapping | list):
            parts += tables(key, value)
    return "\n\n".join(parts) + "\n"


def tables(title: str, value: Mapping | Sequence, level: int = 2) -> list[str]:
    """`value` as a table if it holds rows, otherwise its parts under headings of their own."""
    rows = as_rows(value)
    heading = f"{'#' * min(level, 4)} {title}"
    if rows is not None:
        return [heading, table(rows)] if rows else []
    if isinstance(value, Mapping):
        flat = {key: part for key, part in value.items() if not isinstance(part, Mapping | list) or not as_rows(part)}
        parts = [heading]
        if flat:
            parts.append("\n".join(f"- {key}: {shown(part)}" for key, part in flat.items()))
        for key, part in value.items():
            if key not in flat:
                parts += tables(str(key), part, level + 1)
        return parts
    return [heading, shown(value)]


def as_rows(value: object) -> list[dict] | None:
    """A list of dictionaries as it is, a dictionary of dictionaries with its keys as a first column, None otherwise."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return [dict(row) for row in value]
    if isinstance(value, Mapping) and len(value) > 1 and all(isinstance(row, Mapping) for row in value.values()):
        return [{"name": key, **row} for key, row in value.items()]
    return None


def table(rows: Sequence[Mapping]) -> str:
    """A Markdown table with every key that occurs as a column; long tables end with how many rows were left out."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(map(str, columns))} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(shown(row.get(column, '')) for column in columns)} |" for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        lines.append(f"\n{len(rows) - MOST_ROWS} more rows are in the file.")
    return "\n".join(lines)


def shown(value: object) -> str:
    """A value in a cell: numbers with four digits, everything else as short text that no table stumbles over."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        text = value
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    elif isinstance(value, list):
        text = ", ".join(shown(part) for part in value)
    else:
        text = str(value)
    text = " ".join(text.split())
    text = text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
    return "".join(f"\\{letter}" if letter in "|*_<>$[]`#{}~" else letter for letter in text)
