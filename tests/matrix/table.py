"""The committed table of verdicts, and how it looks in README."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from matrix.bench import Verdict

STORED = Path(__file__).parent / "table.json"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
SIGNS = {"works": "yes", "refused": "no", "idle": "–", "fault": "**fault**"}
Table = dict[str, dict[str, Verdict]]  # by pipeline, then by technique


def read_table() -> Table:
    """The committed verdicts."""
    if not STORED.exists():
        return {}
    stored = json.loads(STORED.read_text())
    return {name: {column: Verdict(**cell) for column, cell in row.items()} for name, row in stored.items()}


def write_table(table: Mapping[str, Mapping[str, Verdict]]) -> None:
    rows = {
        name: {column: {key: value for key, value in asdict(found).items() if value} for column, found in row.items()}
        for name, row in table.items()
    }
    STORED.write_text(json.dumps(rows, indent=1) + "\n")


def as_markdown(table: Mapping[str, Mapping[str, Verdict]]) -> str:
    """A row for each technique, a column for each pipeline, and the reasons of refusals below."""
    names = list(table)
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"| technique | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for column in columns:
        cells = (SIGNS[table[name][column].status] if column in table[name] else "" for name in names)
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put_into_readme(table: Mapping[str, Mapping[str, Verdict]]) -> None:
    """Replace what stands between the markers."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{as_markdown(table)}\n\n{END}{after}")
