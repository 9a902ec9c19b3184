"""The committed table of verdicts, and how it looks in README."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap

from matrix.bench import Verdict

STORED = Path(__file__).parent / "table.json"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
SIGNS = {"works": "✓", "refused": "–", "idle": "○", "fault": "**fault**"}
LEGEND = (
    "✓ works: it does something, makes the same twice, and its removal is bit-identical. "
    "– is refused with a reason and without a trace, when it is applied or, where that depends on the call, at the "
    "call. "
    "○ has nothing to do there, and says so. An empty cell is not tried. "
    "Tried on tiny full pipelines of random weights (`tests/matrix`); `make matrix` tries them again, and "
    "`tests/matrix/table.json` holds every reason."
)
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
    """A row for each pipeline, a numbered column for each technique, and what the numbers and signs mean."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    numbered = ", ".join(f"{number} {column}" for number, column in enumerate(columns, 1))
    lines = [f"| pipeline | {' | '.join(map(str, range(1, len(columns) + 1)))} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        signs = (SIGNS[row[column].status] if column in row else " " for column in columns)
        lines.append(f"| {name} | {' | '.join(signs)} |")
    return "\n".join([*wrap(f"{numbered}.", 120), "", *lines, "", *wrap(LEGEND, 120)])


def between_markers() -> tuple[str, str, str]:
    """README before the table, the table, and what follows. Raises ValueError if the markers are gone."""
    before, begin, rest = README.read_text().partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold {BEGIN} and {END}, between which the matrix stands")
    return before, inside.strip(), after


def put_into_readme(table: Mapping[str, Mapping[str, Verdict]]) -> None:
    """Replace what stands between the markers."""
    before, _, after = between_markers()
    README.write_text(f"{before}{BEGIN}\n\n{as_markdown(table)}\n\n{END}{after}")
