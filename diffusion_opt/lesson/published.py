"""Results of the repository's benchmarks, for the tables of lessons: what takes hours is not run again there.

`published("distillation_methods")` reads `benchmarks/results/distillation_methods.json`, written by the script of that
name. Every results file says on which machine it was made; quality compares across machines, seconds do not.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def published(name: str) -> dict[str, Any]:
    """A results file by name, without its ending. Raises FileNotFoundError, with the names there are."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in RESULTS.glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"there are no results {name!r} in {RESULTS}; there are {there}. They come with a clone of the repository, "
            "installed with `pip install -e .`"
        )
    return json.loads(path.read_text())
