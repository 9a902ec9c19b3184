"""tools/notebooks.py: each rule catches what it is for, cleaning is stable, and errors inside widgets are found."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

TOP = "# 99 A lesson\n\nAbout 1 minute.\n\nYou will be able to\n\n- test"


def lesson(*extra, cells=36):
    """A notebook that breaks no rule, with further code cells at its end."""
    frame = [new_markdown_cell(TOP), new_code_cell("import torch")]
    frame += [new_markdown_cell(section) for section in ("## Recap", "## Limits", "## Sources", "## Next")]
    frame += [new_markdown_cell("text") for _ in range(cells - len(frame) - len(extra))]
    notebook = new_notebook(cells=[*frame, *(new_code_cell(source) for source in extra)])
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    return notebook


@pytest.fixture
def problems(tool, tmp_path):
    def found(notebook):
        path = tmp_path / "99_lesson.ipynb"
        nbformat.write(notebook, path)
        return "; ".join(tool.problems(path))

    return found


def test_a_lesson_in_form_has_no_problems(problems):
    assert problems(lesson("torch.ones(2)")) == ""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("!pip install torch", "a shell line or a magic"),
        ("x = 1\n%matplotlib widget", "a shell line or a magic"),
        ("import math", "imports math; all imports stand in the first code cell"),
        ("from sys import path", "imports sys"),
        ("open('../data/x.json')", "the path '../data/x.json'"),
        ("open('runs/x.json')", "the path 'runs/x.json'"),
        ("def f():\n" + "    x = 1\n" * 25, "f has 26 lines; at most 25"),
        ("class Long:\n" + "    x = 1\n" * 15, "Long has 16 lines; at most 15"),
        ("def f(): ...\ndef f(): ...", "f is defined twice"),
        ("x = 1\n" * 276, "277 lines of code; at most 275"),
    ],
)
def test_code_rules(problems, source, words):
    assert words in problems(lesson(source))


def test_matplotlib_is_left_to_the_package(problems):
    notebook = lesson()
    notebook.cells[1].source = "import matplotlib.pyplot as plt"
    assert "figures come from diffusion_opt.lesson.plots" in problems(notebook)


@pytest.mark.parametrize("name", ["0", "a1b2c3d4", "a1b2c3d4-1111-2222-3333-444455556666", "Cell", "cell_1"])
def test_ids_are_words(problems, name):
    notebook = lesson()
    notebook.cells[5]["id"] = name
    assert f"cell id {name!r}" in problems(notebook)


def test_ids_are_unique(tool):
    notebook = lesson()
    notebook.cells[5]["id"] = notebook.cells[6]["id"]
    assert "cell id 'cell-6' occurs twice" in "; ".join(tool.check_cells(notebook))


@pytest.mark.parametrize("cells", [23, 53])
def test_number_of_cells(problems, cells):
    assert f"{cells} cells; a lesson has 24 to 52" in problems(lesson(cells=cells))


@pytest.mark.parametrize("counts", [(1, None), (2, 1), (1, 3)])
def test_execution_is_all_or_nothing(problems, counts):
    notebook = lesson("torch.ones(2)")
    for cell, number in zip((notebook.cells[1], notebook.cells[-1]), counts, strict=True):
        cell.execution_count = number
    assert "executed in part or out of order" in problems(notebook)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (new_output("error", ename="ValueError", evalue="no", traceback=[]), "stored error ValueError: no"),
        (new_output("stream", name="stderr", text="UserWarning: hm\n"), "writes to stderr: UserWarning: hm"),
        (new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}), "a live widget"),
        (new_output("display_data", {"text/plain": "<function f at 0x7f00aa>"}), "an object's address"),
    ],
)
def test_outputs(problems, output, words):
    notebook = lesson("torch.ones(2)")
    for number, cell in enumerate((notebook.cells[1], notebook.cells[-1]), start=1):
        cell.execution_count = number
    notebook.cells[-1].outputs = [output]
    assert words in problems(notebook)


def test_outputs_without_counts_are_caught(problems):
    notebook = lesson("torch.ones(2)")
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text="x")]
    assert "outputs without execution counts" in problems(notebook)


@pytest.mark.parametrize("tag", ["raises-exception", "skip-execution"])
def test_tags_that_hide_failures(problems, tag):
    notebook = lesson("torch.ones(2)")
    notebook.cells[-1].metadata["tags"] = [tag]
    assert "a tag hides failures" in problems(notebook)


@pytest.mark.parametrize("words", ["minute", "You will be able to", "# "])
def test_the_frame_on_top(problems, words):
    notebook = lesson()
    notebook.cells[0].source = TOP.replace(words, "")
    assert problems(notebook)


@pytest.mark.parametrize("position", [2, 3, 4, 5])
def test_the_frame_at_the_end(problems, position):
    notebook = lesson()
    section, notebook.cells[position].source = notebook.cells[position].source, "text"
    assert f"no section '{section}'" in problems(notebook)


def test_size(problems):
    notebook = lesson()
    notebook.cells[6].source = "x" * 600_000
    assert "at most 600,000" in problems(notebook)


def test_a_file_that_is_no_notebook(tool, tmp_path):
    path = tmp_path / "99_broken.ipynb"
    path.write_text("{")
    assert "not a valid notebook" in tool.problems(path)[0]


def test_cleaning_keeps_pictures_text_counts_and_ids_and_drops_the_rest(tool):
    notebook = lesson("torch.ones(2)")
    cell = notebook.cells[-1]
    cell.execution_count = 2
    cell.metadata = nbformat.from_dict({"execution": {"iopub.status.busy": "2026"}, "tags": ["kept"]})
    picture = new_output("display_data", {"image/png": "aGk="}, metadata={"image/png": {"width": 3}})
    view = new_output("display_data", {tool.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "IntSlider()"})
    cell.outputs = [picture, view, new_output("stream", name="stdout", text="x")]
    notebook.metadata["widgets"] = {tool.WIDGET_STATE: {"state": {}}}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.2"}
    tool.clean(notebook)
    assert [output.output_type for output in cell.outputs] == ["display_data", "stream"]
    assert (cell.id, cell.execution_count, dict(cell.metadata)) == ("cell-35", 2, {"tags": ["kept"]})
    assert notebook.metadata == {"kernelspec": tool.KERNEL, "language_info": {"name": "python"}}
    assert cell.outputs[0].metadata == {}


def test_stripping_drops_all_outputs(tool, problems):
    notebook = lesson("torch.ones(2)")
    notebook.cells[-1].update(execution_count=1, outputs=[new_output("stream", name="stdout", text="x")])
    tool.strip(notebook)
    assert notebook.cells[-1].outputs == [] and notebook.cells[-1].execution_count is None
    assert problems(notebook) == ""


def test_names_choose_notebooks(tool, tmp_path):
    for name in ("01_a", "02_b"):
        nbformat.write(lesson(), tmp_path / f"{name}.ipynb")
    assert [path.stem for path in tool.choose([], tmp_path)] == ["01_a", "02_b"]
    assert [path.stem for path in tool.choose(["02", "notebooks/02_b.ipynb"], tmp_path)] == ["02_b"]
    with pytest.raises(tool.NotebookError, match="no notebook begins with '07'; there are 01_a, 02_b"):
        tool.choose(["07"], tmp_path)


def test_an_unknown_name_is_one_line_and_not_zero(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["check", "77_nothing"])
    assert stop.value.code == 2
    assert "no notebook begins with '77_nothing'" in capsys.readouterr().err


def state(*outputs, model="OutputModel"):
    return {"m": {"model_name": model, "state": {"outputs": list(outputs)}}}


def test_errors_saved_in_widgets_are_found(tool):
    notebook = lesson()
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    assert tool.widget_errors(notebook) == []
    notebook.metadata["widgets"] = {tool.WIDGET_STATE: {"state": state(error)}}
    assert tool.widget_errors(notebook) == ["ValueError: no"]
    notebook.metadata["widgets"] = {tool.WIDGET_STATE: {"state": state({"output_type": "stream"})}}
    assert tool.widget_errors(notebook) == []


BROKEN_WIDGETS = {
    "at the first draw": "widgets.interactive(lambda n: 1 / n, n=widgets.IntSlider(value=0, min=0, max=3))",
    "after a move": "w = widgets.interactive(lambda n: 1 / (n - 3), n=widgets.IntSlider(0, 0, 3))\n"
    "w.children[0].value = 3\nw",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN_WIDGETS)
def test_a_kernel_that_says_nothing_does_not_hide_a_broken_widget(tool, tmp_path, case):
    notebook = new_notebook(cells=[new_code_cell("import ipywidgets as widgets"), new_code_cell(BROKEN_WIDGETS[case])])
    with pytest.raises(tool.NotebookError, match="a callback of a widget failed: ZeroDivisionError"):
        tool.execute(notebook, tmp_path)


@pytest.mark.slow
def test_refresh_is_repeatable_to_the_byte_and_leaves_a_failing_notebook_alone(tool, tmp_path):
    path = tmp_path / "99_lesson.ipynb"
    source = "import ipywidgets as widgets\nprint(1)\nprint(2, flush=True)\nprint(3)\nwidgets.IntSlider()"
    tool.write(new_notebook(cells=[new_code_cell(source, id="slider")]), path)
    tool.refresh(path)
    first = path.read_bytes()
    tool.refresh(path)
    assert path.read_bytes() == first
    assert b"widget-view" not in first and b"3\\n" in first

    tool.write(new_notebook(cells=[new_code_cell("1 / 0", id="error")]), path)
    before = path.read_bytes()
    with pytest.raises(tool.NotebookError, match="a cell failed: ZeroDivisionError"):
        tool.refresh(path)
    assert path.read_bytes() == before
