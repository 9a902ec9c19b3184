"""Technique x pipeline: each cell does what the committed table says.

The fast cells of `techniques.QUICK` are tried at each run. The others are slow tests, and those that trace graphs run
in the call without shape checks. After a change that alters a cell, `make matrix` writes the table anew.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
from matrix.bench import Bench, Verdict, refusal, verdict
from matrix.table import as_markdown, between_markers, read_table
from matrix.techniques import COMPILED, FAST, QUICK, SLOW, TRACED, columns_of
from tiny_pipelines import TINY

TABLE = read_table()


def check(name: str, columns: Iterable[str], folder: Path) -> None:
    """Fail with every cell that is not as the table says, and why."""
    bench, cells = Bench(name, folder), columns_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {column: verdict(cells[column], bench) for column in columns}
    expected = TABLE[name]
    wrong = {
        column: f"{one.status} ({one.reason}), the table says {expected[column].status}"
        for column, one in found.items()
        if one.status != expected[column].status
    }
    assert not wrong


@pytest.mark.parametrize("name", QUICK)
def test_fast_cells(name, tmp_path):
    check(name, FAST, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if name not in QUICK])
def test_fast_cells_of_the_other_pipelines(name, tmp_path):
    check(name, FAST, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_cells_that_calibrate_search_quantize_and_save(name, tmp_path):
    check(name, SLOW, tmp_path)


@pytest.mark.compiled
@pytest.mark.parametrize("name", TRACED)
def test_cells_that_compile(name, tmp_path):
    check(name, COMPILED, tmp_path)


def test_the_table_has_every_cell_and_no_fault_beside_the_known_ones():
    assert {name: list(row) for name, row in TABLE.items()} == {name: list(columns_of(name)) for name in TINY}
    for name, row in TABLE.items():
        for column, found in row.items():
            assert bool(found.reason) == (found.status != "works"), (name, column)
    assert [(name, column) for name, row in TABLE.items() for column in row if row[column].status == "fault"] == []


def test_readme_shows_the_table():
    _, shown, _ = between_markers()
    assert shown == as_markdown(TABLE), "run `make matrix`"


class Leaves:
    """A technique that refuses after it has changed something."""

    def apply(self, pipe):
        pipe.transformer.touched = True
        raise ValueError("refused, but too late for that")


def test_what_a_cell_finds_fault_with(tmp_path):
    """The check itself: traces, a reason that is none, other errors, and no effect without a word."""
    cell = FAST["FixedInterval"]
    bench = Bench("wan", tmp_path)
    assert verdict(type(cell)(lambda bench: Leaves(), cell.effect), bench).status == "fault"
    assert refusal(ValueError("no"), untouched=True).status == "fault"
    assert verdict(lambda bench: bench.nothing, bench) == Verdict(
        "fault", "AttributeError: 'Bench' object has no attribute 'nothing'"
    )
    assert verdict(type(cell)(cell.make, lambda bench: 0), bench).reason == "it has no effect and says nothing"
    assert verdict(cell, bench) == Verdict("works")
