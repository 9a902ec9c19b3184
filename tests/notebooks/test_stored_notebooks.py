"""The notebooks as they are stored: valid, clean, in the form of the course, and in step with checks and solutions.

Nothing is executed here except the stubs of exercises; `make lessons` runs the notebooks.
"""

import ast
import inspect
import linecache
import re
from pathlib import Path

import pytest

from diffusion_opt.lesson import checks, solutions

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SOLUTION_TEXT = "\n".join(inspect.getsource(lesson) for lesson in solutions.LESSONS)


def cells(tool, path, kind):
    return [cell for cell in tool.read(path).cells if cell.cell_type == kind]


def test_there_are_notebooks_and_numbers_are_unique():
    numbers = [path.name.partition("_")[0] for path in NOTEBOOKS]
    assert numbers and len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+", path.stem) for path in NOTEBOOKS)


@EACH
def test_form(tool, path):
    assert not tool.problems(path)


@EACH
def test_every_check_exists_and_belongs_to_this_lesson(tool, path):
    called = re.findall(r"checks\.(ex_\w+)", "\n".join(cell.source for cell in cells(tool, path, "code")))
    assert called, "a lesson has at least one exercise"
    assert all(hasattr(checks, name) and name.startswith(f"ex_{path.name.partition('_')[0]}_") for name in called)


def test_every_check_is_used_in_a_notebook(tool):
    source = "\n".join(cell.source for path in NOTEBOOKS for cell in cells(tool, path, "code"))
    assert not [name for name in solutions.SOLUTIONS if f"checks.{name}(" not in source]


@EACH
def test_each_exercise_has_a_folded_solution_that_is_the_tested_one(tool, path):
    folded = [cell.source for cell in cells(tool, path, "markdown") if "<details>" in cell.source]
    code = [block for source in folded for block in re.findall(r"```python\n(.*?)```", source, flags=re.DOTALL)]
    exercises = re.findall(r"checks\.ex_", "\n".join(cell.source for cell in cells(tool, path, "code")))
    assert len(code) == len(exercises)
    assert not [block for block in code if block not in SOLUTION_TEXT]


@EACH
def test_a_stub_is_open_and_says_so(tool, path, capsys):
    """Each exercise cell runs as it is stored, with nothing defined before it but the imports, and says "not yet"."""
    sources = [cell.source for cell in cells(tool, path, "code")]
    for stub in (source for source in sources if re.search(r"^checks\.ex_", source, flags=re.MULTILINE)):
        source = sources[0] + "\n" + stub
        linecache.cache[path.name] = (len(source), None, source.splitlines(keepends=True), path.name)  # Triton reads it
        exec(compile(source, path.name, "exec"), {})
        assert capsys.readouterr().out == "not yet\n", stub


@EACH
def test_what_is_stored_under_an_exercise_gives_nothing_away(tool, path):
    stubs = [cell for cell in cells(tool, path, "code") if re.search(r"^checks\.ex_", cell.source, flags=re.MULTILINE)]
    said = [[output.get("text") for output in cell.outputs] for cell in stubs if cell.execution_count]
    assert said == [["not yet\n"]] * len(said)


@EACH
def test_a_live_figure_follows_a_static_one(tool, path):
    code = [cell.source for cell in cells(tool, path, "code")]
    first_live = next((i for i, source in enumerate(code) if "explore(" in source), None)
    assert first_live is not None, "a lesson has at least one live figure"
    assert any(re.search(r"^plots\.", source, flags=re.MULTILINE) for source in code[:first_live])


@EACH
def test_claims_are_asserted_and_something_is_predicted(tool, path):
    trees = [ast.parse(cell.source) for cell in cells(tool, path, "code")]
    assert sum(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree)) >= 2
    assert any("**Predict.**" in cell.source for cell in cells(tool, path, "markdown"))


def test_the_map_links_every_lesson(tool):
    text = "\n".join(cell.source for cell in cells(tool, FOLDER / "00_start_here.ipynb", "markdown"))
    assert not [path.name for path in NOTEBOOKS if path.name != "00_start_here.ipynb" and f"({path.name})" not in text]


@EACH
def test_a_recap_has_three_questions_with_folded_answers_and_other_names(tool, path):
    (recap,) = [cell.source for cell in cells(tool, path, "markdown") if cell.source.startswith("## Recap")]
    questions = re.findall(r"^\d\. .+ <details><summary>Answer</summary>.+</details>$", recap, flags=re.MULTILINE)
    assert len(questions) == 3
    assert "**On FLUX.2, LTX-2 and Wan.**" in recap and "| here | elsewhere |" in recap
