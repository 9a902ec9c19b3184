"""The learner's copies of the lessons, in `runs/course/` (git ignores `runs/`, so it stays clean).

    python tools/course.py             make the copies that are missing, and offer what changed in the others (make lab)
    python tools/course.py --merge     take what changed without asking
    python tools/course.py --keep      leave copies that exist as they are

The lessons in `notebooks/` are stored executed, for reading and for the tests. A copy has no outputs, so that no answer
stands under its question. Under each **Predict** a cell takes the guess, and a cell after the result comments it. Cells
that only assert what the text claims (tag `claim`) are folded. A stub is followed by the name of its hints.

What was given is kept beside the copies (`.given/`). When a lesson changes, the three versions are merged cell by cell:
a cell the learner did not touch becomes the new one, a cell of one's own stays, an answer stays even if its exercise
changed, and then the new text stands in a cell below it. The copy as it was is kept as `NAME.before.ipynb`.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
LESSONS, COURSE = ROOT / "notebooks", ROOT / "runs" / "course"
CHECK = re.compile(r"^checks\.ex_(\w+)", flags=re.MULTILINE)
CHANGED = "*The lesson has changed here; this is its new version. Your own cell stands above.*\n\n"


def learner(lesson: NotebookNode, number: str) -> NotebookNode:
    """A lesson as a learner begins it; `number` is that of the lesson, such as "05" or "00b"."""
    cells, waiting = [], None
    for cell in lesson.cells:
        if waiting and cell.cell_type == "markdown":
            cells.append(_comparison(waiting, number))
            waiting = None
        cells.append(_begun(cell))
        if cell.cell_type == "markdown" and "**Predict.**" in cell.source:
            cells.append(_guess(cell.id, number))
            waiting = cell.id
    return nbformat.from_dict({**lesson, "cells": cells})


def _begun(cell: NotebookNode) -> NotebookNode:
    cell = nbformat.from_dict(cell)
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
        if "claim" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}
        if exercise := CHECK.search(cell.source):
            cell.source += f'\n# checks.hint("{exercise[1]}")  gives one hint at a time'
    return cell


def _guess(name: str, number: str) -> NotebookNode:
    source = f'from diffusion_opt.lesson.predictions import compare, predict\n\npredict("{number}/{name}")'
    return new_code_cell(source, id=f"{name}-guess")


def _comparison(name: str, number: str) -> NotebookNode:
    return new_code_cell(f'compare("{number}/{name}")', id=f"{name}-compare")


def same(one: NotebookNode, other: NotebookNode) -> bool:
    """Whether two cells say the same; outputs and counts do not matter."""
    return one.cell_type == other.cell_type and one.source == other.source


def merge(given: NotebookNode, mine: NotebookNode, new: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """The new lesson with all that the learner wrote, and the ids of cells that both have changed.

    Cells belong together by their ids. A cell of the learner's own follows the cell that it followed.
    """
    before = {cell.id: cell for cell in given.cells}
    kept = {cell.id: cell for cell in mine.cells}
    coming = {cell.id for cell in new.cells}
    cells, both = [], []
    own = _own_cells(mine, before, coming)
    cells += own.get(None, [])
    for cell in new.cells:
        old, written = before.get(cell.id), kept.get(cell.id)
        untouched = written is None or (old is not None and same(written, old))
        if untouched:
            cells.append(written if written is not None and same(written, cell) else cell)
        else:
            cells.append(written)
            if old is not None and not same(old, cell) and not same(written, cell):
                both.append(cell.id)
                cells.append(new_markdown_cell(CHANGED + _quoted(cell), id=f"{cell.id}-new"))
        cells += own.get(cell.id, [])
    return nbformat.from_dict({**new, "cells": cells}), both


def _quoted(cell: NotebookNode) -> str:
    return f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source


def _own_cells(mine: NotebookNode, before: dict, coming: set[str]) -> dict[str | None, list[NotebookNode]]:
    """The learner's own cells, and changed cells the new lesson dropped, by the lesson's cell that they follow."""
    own: dict[str | None, list[NotebookNode]] = {}
    anchor = None
    for cell in mine.cells:
        if cell.id in coming:
            anchor = cell.id
        elif cell.id not in before or not same(cell, before[cell.id]):
            own.setdefault(anchor, []).append(cell)
    return own


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Validate, then replace the file in one move."""
    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(path)


def update(lesson: Path, course: Path, accept) -> str:
    """Bring one copy up to date and say what was done; `accept(text)` answers whether a change is taken."""
    new = learner(read(lesson), lesson.name.partition("_")[0])
    copy, given = course / lesson.name, course / ".given" / lesson.name
    if not copy.exists():
        write(new, copy)
        write(new, given)
        return "new"
    old = read(given) if given.exists() else new
    changes = [
        cell.id for cell in new.cells if not any(same(cell, other) for other in old.cells if other.id == cell.id)
    ]
    if not changes and len(old.cells) == len(new.cells):
        return "unchanged"
    if not accept(
        f"{lesson.stem} has changed in {max(1, len(changes))} cells. Take the changes and keep your answers?"
    ):
        return "changed, and left as it is (python tools/course.py --merge takes the changes)"
    mine = read(copy)
    merged, both = merge(old, mine, new)
    write(mine, copy.with_suffix(".before.ipynb"))
    write(merged, copy)
    write(new, given)
    note = f", look at {', '.join(both)}" if both else ""
    return f"merged{note}; as it was: {copy.with_suffix('.before.ipynb').name}"


def ask(text: str) -> bool:
    """The learner's answer; no where nobody can be asked."""
    return sys.stdin.isatty() and input(f"{text} [Y/n] ").strip().lower() in ("", "y", "yes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--merge", action="store_true", help="take what changed without asking")
    choice.add_argument("--keep", action="store_true", help="leave copies that exist as they are")
    options = parser.parse_args(arguments)
    accept = (lambda text: options.merge) if options.merge or options.keep else ask
    for lesson in sorted(LESSONS.glob("*.ipynb")):
        done = update(lesson, COURSE, accept)
        if done != "unchanged":
            print(f"{lesson.stem}: {done}")
    print(f"your copies are in {COURSE.relative_to(ROOT)}; begin with {sorted(LESSONS.glob('*.ipynb'))[0].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
