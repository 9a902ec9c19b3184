"""tools/course.py: copies spoil nothing, keep what a learner wrote, and take what changed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from diffusion_opt.lesson.checks.hints import HINTS
from diffusion_opt.lesson.predictions import QUESTIONS, Predictions, Question

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def lesson(**sources):
    """A lesson with a code cell for each name, executed."""
    cells = [new_code_cell(source, id=name.replace("_", "-")) for name, source in sources.items()]
    for number, cell in enumerate(cells, start=1):
        cell.update(execution_count=number, outputs=[new_output("stream", name="stdout", text="1\n")])
    return new_notebook(cells=cells)


def sources(notebook):
    return {cell.id: cell.source for cell in notebook.cells}


@EACH
def test_a_copy_has_no_output_and_asks_before_each_result(course, path):
    given, copy = course.read(path), course.learner(course.read(path), path.name.partition("_")[0])
    code = [cell for cell in copy.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    asked = [cell.id for cell in given.cells if cell.cell_type == "markdown" and "**Predict.**" in cell.source]
    text = "\n".join(cell.source for cell in code)
    assert re.findall(r'^predict\("(.+?)"\)$', text, flags=re.MULTILINE) == [
        f"{path.name.partition('_')[0]}/{name}" for name in asked
    ]
    assert re.findall(r'^compare\("(.+?)"\)$', text, flags=re.MULTILINE) == [
        f"{path.name.partition('_')[0]}/{name}" for name in asked
    ]
    assert set(re.findall(r'# checks\.hint\("(.+?)"\)', text)) <= set(HINTS)
    nbformat.validate(copy)


def test_every_predict_has_a_question_and_the_reverse(course):
    asked = {
        f"{path.name.partition('_')[0]}/{cell.id}"
        for path in NOTEBOOKS
        for cell in course.read(path).cells
        if cell.cell_type == "markdown" and "**Predict.**" in cell.source
    }
    assert asked == set(QUESTIONS)


def test_claims_are_folded_and_the_rest_is_not(course):
    given = lesson(one="1", two="assert True")
    given.cells[1].metadata["tags"] = ["claim"]
    copy = course.learner(given, "99")
    assert "jupyter" not in copy.cells[0].metadata
    assert copy.cells[1].metadata["jupyter"] == {"source_hidden": True}
    assert "jupyter" not in given.cells[1].metadata, "the lesson itself is left alone"


def test_what_the_learner_did_not_touch_becomes_new_and_the_rest_stays(course):
    given, new = lesson(a="1", b="...", c="3", d="4"), lesson(a="10", b="...", c="30", e="5")
    mine = lesson(a="1", b="answer", note="mine", c="my 3", d="4")
    merged, both = course.merge(given, mine, new)
    assert list(sources(merged).items())[:4] == [("a", "10"), ("b", "answer"), ("note", "mine"), ("c", "my 3")]
    assert both == ["c"] and "```python\n30\n```" in sources(merged)["c-new"]
    assert sources(merged)["e"] == "5" and "d" not in sources(merged), "an untouched cell goes with its lesson"


def test_an_answer_stays_when_its_exercise_is_dropped_or_moved(course):
    given, mine, new = lesson(a="1", b="..."), lesson(a="1", b="answer"), lesson(a="1")
    assert sources(course.merge(given, mine, new)[0]) == {"a": "1", "b": "answer"}
    moved = course.merge(given, mine, lesson(b="...", a="1"))[0]
    assert list(sources(moved).items()) == [("b", "answer"), ("a", "1")]


def test_what_was_run_stays_run_where_nothing_changed(course):
    given = course.learner(lesson(a="1", b="2"), "99")
    merged, _ = course.merge(given, lesson(a="1", b="2"), course.learner(lesson(a="1", b="20"), "99"))
    assert merged.cells[0].outputs and not merged.cells[1].outputs


@pytest.fixture
def opened(course, tmp_path):
    """A folder with one lesson and its copy, and a function that brings the copy up to date."""
    path, copies = tmp_path / "99_lesson.ipynb", tmp_path / "course"
    course.write(lesson(a="1", b="..."), path)

    def update(accept=lambda text: True):
        return course.update(path, copies, accept)

    assert update() == "new"
    return path, copies / path.name, update


def test_a_copy_is_left_alone_until_the_lesson_changes(course, opened):
    path, copy, update = opened
    notebook = course.read(copy)
    notebook.cells[1].source = "answer"
    course.write(notebook, copy)
    assert update(accept=lambda text: pytest.fail("nothing to ask")) == "unchanged"

    course.write(lesson(a="10", b="..."), path)
    assert update(accept=lambda text: False).startswith("changed, and left as it is")
    assert sources(course.read(copy)) == {"a": "1", "b": "answer"}
    assert update().startswith("merged; as it was: 99_lesson.before.ipynb")
    assert sources(course.read(copy)) == {"a": "10", "b": "answer"}
    assert sources(course.read(copy.with_suffix(".before.ipynb"))) == {"a": "1", "b": "answer"}
    assert update() == "unchanged"


def test_a_dropped_cell_is_a_change_too(course, opened):
    path, copy, update = opened
    course.write(lesson(b="..."), path)
    assert update().startswith("merged")
    assert sources(course.read(copy)) == {"b": "..."}


def test_nobody_is_asked_where_nobody_can_answer(course, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail("asked"))
    assert course.ask("?") is False


PLANE = {"99/a": Question(("up", "down"), 1, "It falls."), "99/b": Question(("x", "y"), 0, "So.")}


def test_a_guess_is_taken_and_commented(capsys):
    session = Predictions(PLANE)
    session.compare("99/a")
    assert capsys.readouterr().out == "no guess yet. It falls.\n"
    buttons = session.predict("99/a")
    assert buttons.value is None and [label for label, _ in buttons.options] == ["up", "down"]
    buttons.value = 0
    session.compare("99/a")
    assert capsys.readouterr().out.startswith("down (you guessed: up). It falls.\n0 of 1 guesses")
    assert session.predict("99/a").value == 0, "shown again, it remembers"
    session.predict("99/b", "a")
    session.compare("99/b")
    assert capsys.readouterr().out == "x (as you guessed). So.\n1 of 2 guesses in this session were right\n"


def test_a_question_and_a_guess_that_do_not_exist_are_refused():
    session = Predictions(PLANE)
    with pytest.raises(ValueError, match="no question '99/c'; there are 99/a, 99/b"):
        session.predict("99/c")
    with pytest.raises(ValueError, match="one of a, b, got 'c'"):
        session.predict("99/a", "c")
    with pytest.raises(ValueError, match="two choices or more"):
        Question(("only",), 0, "")


def test_text_cells_take_part_in_a_merge(course):
    given, new = (new_notebook(cells=[new_markdown_cell(text, id="t")]) for text in ("old", "new"))
    assert sources(course.merge(given, given, new)[0]) == {"t": "new"}
